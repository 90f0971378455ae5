"""Pictures of an evaluation: which images were wrong, where the model looked, what each stage of a U-Net saw.

Images come as the views that the model saw, (N, 3, S, S) uint8; every picture is drawn on that view.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cvlab.explain import explain, grad_cam, predict, predicted_masks, region_score
from cvlab.models import Model
from cvlab.render import COLORMAP, grid, heatmap_picture, mask_overlay, overlay, strip, to_picture
from cvlab.transforms import to_float, whole_mask


def misclassified(model: Model, views: Tensor, labels: Tensor, predicted: Tensor, most: int = 24) -> Image.Image:
    """The first `most` wrong images, true / predicted class above, each beside the evidence for the wrong class."""
    drawn, titles = [], []
    for i in (predicted != labels).nonzero()[:most, 0].tolist():
        images = to_float(views[i])[None]
        _, attribution = grad_cam(model, images, int(predicted[i]))
        drawn += [to_picture(images), overlay(images, attribution)]
        titles += [f"true: {model.class_names[labels[i]]}", f"predicted: {model.class_names[predicted[i]]}"]
    return grid(drawn, titles, 6)


def grad_cam_rows(
    model: Model,
    views: Tensor,
    titles: Sequence[str],
    stage: str | None = None,
    colormap: str = COLORMAP,
    opacity: float = 0.7,
) -> Image.Image:
    """Original, heatmap and overlay of each image, for its predicted class at a stage, by default the last."""
    drawn, captions = [], []
    for view, title in zip(views, titles, strict=True):
        images = to_float(view)[None]
        logits, attribution = grad_cam(model, images, stage=stage)
        heat = heatmap_picture(attribution, images.shape[-2:], colormap)
        drawn += [to_picture(images), heat, overlay(images, attribution, colormap, opacity)]
        captions += [title, "heatmap", f"why {model.class_names[logits.argmax()]}"]
    return grid(drawn, captions, 6)


def mask_pairs(model: Model, views: Tensor, masks: Sequence[Tensor], ious: Sequence[float]) -> Image.Image:
    """The true mask of each image beside the predicted one, with the image's iou."""
    drawn, titles = [], []
    for view, mask, iou in zip(views, masks, ious, strict=True):
        images = to_float(view)[None]
        pair = whole_mask(mask, model.image_size), predicted_masks(model, predict(model, images))[0]
        drawn += [mask_overlay(to_picture(images), each.any(0).numpy()) for each in pair]
        titles += ["true mask", f"predicted, iou {iou:.3f}"]
    return grid(drawn, titles, 4)


def stage_rows(model: Model, views: Tensor, colormap: str = COLORMAP, opacity: float = 0.7) -> Image.Image:
    """Seg-Grad-CAM of the predicted mask: a row an image, with input, mask and an overlay for every stage."""
    drawn, titles = [], []
    for view in views:
        images = to_float(view)[None]
        photo, mask = to_picture(images), predicted_masks(model, predict(model, images))[:, 0]
        drawn += [photo, mask_overlay(photo, mask[0].numpy())]
        if mask.any():
            maps = explain(model, images, region_score(mask)).maps["grad_cam"]
            drawn += [overlay(images, attribution, colormap, opacity) for attribution in maps.values()]
            titles += ["image", "predicted mask", *maps]
        else:
            drawn += [photo] * len(model.stages)
            titles += ["image", "nothing found", *["no mask to explain"] * len(model.stages)]
    return grid(drawn, titles, 2 + len(model.stages))


def training_frame(model: Model, views: Tensor, title: str, masks: Sequence[Tensor] | None = None) -> Image.Image:
    """A moment of a training: of a few images where the model sees its predicted class, or its mask and what for.

    Args:
        masks: of a segmenter, the true ones.
    """
    drawn, titles, device = [], [], next(model.parameters()).device
    for i, view in enumerate(views):
        images = to_float(view)[None].to(device)
        if model.task == "classification":
            logits, attribution = grad_cam(model, images)
            drawn.append(overlay(images, attribution))
            titles.append(model.class_names[logits.argmax()])
            continue
        photo, mask = to_picture(images), predicted_masks(model, predict(model, images))[0].cpu()
        for each in (whole_mask(masks[i], model.image_size), mask):
            drawn.append(mask_overlay(photo, each.any(0).numpy()))
        drawn.append(overlay(images, grad_cam(model, images)[1]) if mask[0].any() else photo)
        titles += ["true mask", "predicted", "why" if mask[0].any() else "nothing found"]
    return strip(drawn, titles, title)


def spread(labels: Tensor, per_class: bool) -> Tensor:
    """Indices of the images to explain: two of each of the first five classes, or six spread over all."""
    if per_class:
        return torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()[:5]])
    return torch.linspace(0, len(labels) - 1, min(6, len(labels))).long()
