"""Pictures: colours for maps, overlays, masks, and the photos that an evaluation shows.

A map is divided by its maximum, and its minimum is never subtracted: without evidence the photo stays as it is.
"""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cvlab.explain import default_stage, explain, grad_cam, heatmap, predict, predicted_masks, predicted_score
from cvlab.explain.many import predict_photos
from cvlab.files import write_bytes
from cvlab.models import Model, Stage
from cvlab.plots import as_picture
from cvlab.transforms import resize_mask, seen_mask, to_float

SPREADS = ("six", "ten", "classes")
COLORMAP = "inferno"  # perceptually uniform, safe for the colour-blind, black for zero


def to_picture(images: Tensor) -> Image.Image:
    """(1, 3, H, W) or (3, H, W) in [0, 1] to PIL RGB."""
    pixels = images.detach().reshape(3, *images.shape[-2:]).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))


def picture_url(picture: Image.Image) -> str:
    """A picture as the source of an <img>, a JPEG: a PNG takes 70 times as long to encode."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def relative_heat(attribution: Tensor, size: Sequence[int], stage: Stage | None = None) -> np.ndarray:
    """The positive part of a map (1, 1, h, w) at `size` (H, W), divided by its maximum: (H, W) in [0, 1].

    Args:
        stage: whose map it is; its cells are drawn where they look (`heatmap`).
    """
    attribution = attribution.detach().reshape(1, 1, *attribution.shape[-2:]).float()
    heat = heatmap(attribution, size, stage)[0, 0].cpu().numpy()
    return heat / heat.max() if heat.max() > 0 else np.zeros_like(heat)


def heatmap_picture(
    attribution: Tensor, size: Sequence[int], colormap: str = COLORMAP, stage: Stage | None = None
) -> Image.Image:
    """The map alone, coloured from zero to its maximum."""
    return _coloured(relative_heat(attribution, size, stage=stage), colormap)


def overlay(
    view: Tensor, attribution: Tensor, colormap: str = COLORMAP, opacity: float = 0.7, stage: Stage | None = None
) -> Image.Image:
    """A map over the view the network saw: (1, 3, H, W) in [0, 1] and (1, 1, h, w) to PIL RGB.

    The colour's opacity grows with the evidence, so a blank map leaves the picture unchanged.
    """
    heat = relative_heat(attribution, view.shape[-2:], stage=stage)
    alpha = Image.fromarray(np.round(255 * opacity * heat**0.5).astype(np.uint8))
    return Image.composite(_coloured(heat, colormap), to_picture(view), alpha)


def _coloured(heat: np.ndarray, colormap: str) -> Image.Image:
    """(H, W) in [0, 1] in 256 colours, looked up here because matplotlib computes with floats for every pixel."""
    colours = np.round(matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return Image.fromarray(colours[np.minimum(heat * 256, 255).astype(np.uint8)])


def mask_overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A mask (H, W) bool on an image of the same size: inside unchanged, outside pale grey, a black line between.

    A colour tint would not show on objects of that colour.
    """
    pixels = np.asarray(image)
    grey = np.asarray(image.convert("L"))[..., None]
    shown = np.where(mask[..., None], pixels, 160 + 0.35 * grey)
    padded = np.pad(mask, 1, mode="edge")
    within = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shown[mask & ~within] = 0
    return Image.fromarray(np.round(shown).astype(np.uint8))


def enlarged(image: Image.Image, least: int = 320) -> Image.Image:
    """An image enlarged by a whole factor, so that its longer side has at least so many pixels."""
    factor = -(-least // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def grid(images: Sequence[Image.Image], titles: Sequence[str], columns: int, heading: str = "") -> Image.Image:
    """Pictures under their titles, in rows of `columns`, with a heading over all."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set(xticks=[], yticks=[], frame_on=False)  # no tick is made, which takes half of the time
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    if heading:
        figure.suptitle(heading, fontsize=9)
    return as_picture(figure)


# --- pictures of an evaluation: `views` are what the model saw, (N, 3, S, S) uint8 -----------------------------------


def misclassified(model: Model, views: Tensor, labels: Tensor, predicted: Tensor, most: int = 24) -> Image.Image:
    """The first `most` wrong images, each beside the evidence for the class that was wrongly predicted."""
    drawn, titles, last = [], [], model.stages[default_stage(model)]
    for i in (predicted != labels).nonzero()[:most, 0].tolist():
        images = to_float(views[i])[None]
        _, attribution = grad_cam(model, images, int(predicted[i]))
        drawn += [to_picture(model.as_rgb(images)), overlay(model.as_rgb(images), attribution, stage=last)]
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
    """Image, heatmap and overlay of the predicted class of each image, at a stage, by default the last."""
    drawn, captions, stage = [], [], stage or default_stage(model)
    for view, title in zip(views, titles, strict=True):
        images = to_float(view)[None]
        logits, attribution = grad_cam(model, images, stage=stage)
        read_at = model.stages[stage]
        seen, heat = model.as_rgb(images), heatmap_picture(attribution, images.shape[-2:], colormap, stage=read_at)
        drawn += [to_picture(seen), heat, overlay(seen, attribution, colormap, opacity, stage=read_at)]
        captions += [title, "heatmap", f"why {model.class_names[logits.argmax()]}"]
    return grid(drawn, captions, 6)


def mask_triples(model: Model, photos: Sequence[Tensor], masks: Sequence[Tensor], ious: Sequence[float]) -> Image.Image:
    """Each photo, of `read_photos`, its true mask and the predicted one, with the iou of the photo."""
    drawn, titles = [], []
    for view, logits, mask, iou in zip(photos, predict_photos(model, photos), masks, ious, strict=True):
        photo = to_picture(model.as_rgb(to_float(view)))
        pair = [resize_mask(mask, logits.shape[-2:]), predicted_masks(model, logits)[0]]
        drawn += [photo, *(mask_overlay(photo, each[model.first_object :].any(0).numpy()) for each in pair)]
        titles += ["image", "true mask", f"predicted, iou {iou:.3f}"]
    return grid(drawn, titles, 6)


def stage_rows(model: Model, views: Tensor, colormap: str = COLORMAP, opacity: float = 0.7) -> Image.Image:
    """Seg-Grad-CAM of the predicted mask: a row for each image, with input, mask and an overlay for every stage."""
    drawn, titles = [], []
    for view in views:
        images = to_float(view)[None]
        seen, mask = model.as_rgb(images), predicted_masks(model, predict(model, images))[0, model.first_object :]
        photo = to_picture(seen)
        drawn += [photo, mask_overlay(photo, mask.any(0).numpy())]
        if mask.any():
            maps = explain(model, images, predicted_score(model)).maps["grad_cam"]
            drawn += [overlay(seen, maps[name], colormap, opacity, stage=each) for name, each in model.stages.items()]
            titles += ["image", "predicted mask", *maps]
        else:
            drawn += [photo] * len(model.stages)
            titles += ["image", "nothing found", *["no mask to explain"] * len(model.stages)]
    return grid(drawn, titles, 2 + len(model.stages))


def training_frame(model: Model, views: Tensor, title: str, masks: Sequence[Tensor] | None = None) -> Image.Image:
    """A few images during a training: the evidence for the predicted class, or the masks and the evidence for them.

    Args:
        masks: a segmenter's true masks, (C, H, W) bool each.
    """
    drawn, titles = [], []
    last = model.stages[default_stage(model)]
    for i, view in enumerate(views):
        images = to_float(view)[None]
        if model.task == "classification":
            logits, attribution = grad_cam(model, images)
            drawn.append(overlay(model.as_rgb(images), attribution, stage=last))
            titles.append(model.class_names[logits.argmax()])
            continue
        photo, mask = to_picture(model.as_rgb(images)), predicted_masks(model, predict(model, images))[0].cpu()
        pair = [each[model.first_object :] for each in (seen_mask(masks[i], model), mask)]
        drawn += [photo, *(mask_overlay(photo, each.any(0).numpy()) for each in pair)]
        found = pair[1].any()
        drawn.append(overlay(model.as_rgb(images), grad_cam(model, images)[1], stage=last) if found else photo)
        titles += ["image", "true mask", "predicted", "why" if found else "nothing found"]
    return grid(drawn, [name[:24] for name in titles], 6 if model.task == "classification" else 4, title)


def spread(labels: Tensor, choice: str = "six", seed: int = 0) -> Tensor:
    """Indices of images to explain: "six" from first to last; at random "ten", or of five "classes" two each."""
    generator = torch.Generator().manual_seed(seed)
    order, classes = torch.randperm(len(labels), generator=generator), labels.unique()
    if choice == "ten":
        return order[:10].sort().values
    if choice == "classes":
        five = classes[torch.randperm(len(classes), generator=generator)[:5].sort().values]
        return torch.cat([order[labels[order] == label][:2] for label in five])
    return torch.linspace(0, len(labels) - 1, min(6, len(labels))).long()


# --- files ------------------------------------------------------------------------------------------------------------


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG whole or not at all."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())
