"""What the page and its API answer for a photo: prediction, Grad-CAM of one stage, and every stage of a U-Net."""

from dataclasses import dataclass

from PIL import Image
from torch import nn

from cvlab.diagnose import diagnose
from cvlab.explain import default_stage, explain, grad_cam, peak, predict, predicted_masks, predicted_score
from cvlab.render import heatmap_picture, mask_overlay, overlay, to_picture
from cvlab.transforms import resize_logits, view

LEAST_SIDE = 320  # views of small models are enlarged to this for display
MOST_SIDE = 1024  # and photos reduced to this


@dataclass(frozen=True)
class GradCam:
    """One stage's answer for one class: three pictures of the same view, the peak, and a sentence on trust."""

    class_name: str
    stage: str
    original: Image.Image
    heatmap: Image.Image
    overlay: Image.Image
    peak: float
    sentence: str


@dataclass(frozen=True)
class StageMap:
    """What one stage of a U-Net says of the predicted mask."""

    name: str
    resolution: str
    overlay: Image.Image
    peak: float
    sentence: str


def predict_answer(image: Image.Image, model: nn.Module) -> tuple[dict[str, float], Image.Image | None, str]:
    """Shares by class name, mask picture and sentence.

    The shares are a classifier's probabilities, or the share of the photo that each class of a segmenter covers. A
    classifier has no mask and needs no sentence.
    """
    logits = predict(model, view(image, model))
    if model.task == "classification":
        return dict(zip(model.class_names, logits.softmax(1)[0].tolist(), strict=True)), None, ""
    photo = image.copy()
    photo.thumbnail((MOST_SIDE, MOST_SIDE))
    masks = predicted_masks(model, resize_logits(logits, (image.height, image.width)))[0]
    shown = predicted_masks(model, resize_logits(logits, (photo.height, photo.width)))[0].any(0)
    shares = {name: mask.float().mean().item() for name, mask in zip(model.class_names, masks, strict=True)}
    pixels = int(masks.any(0).sum())
    total = image.width * image.height
    sentence = f"The mask covers {pixels:,} of {total:,} pixels ({pixels / total:.1%}), threshold {model.threshold:g}."
    if pixels == 0:
        sentence = f"No pixel reaches the threshold of {model.threshold:g}: the model finds nothing here."
    return shares, enlarged(mask_overlay(photo, shown.numpy())), sentence


def grad_cam_answer(
    image: Image.Image, model: nn.Module, class_name: str | None = None, stage: str | None = None
) -> GradCam:
    """Grad-CAM for a class (None: the predicted one) at a stage (None: the deepest)."""
    images = view(image, model)
    stage = stage or default_stage(model)
    class_idx = class_index(model, class_name)
    logits, attribution = grad_cam(model, images, class_idx, stage)
    if class_idx is None:
        class_idx = int(logits.argmax()) if model.task == "classification" else 0
    return GradCam(
        class_name=model.class_names[class_idx],
        stage=stage,
        original=enlarged(to_picture(images)),
        heatmap=enlarged(heatmap_picture(attribution, images.shape[-2:])),
        overlay=enlarged(overlay(images, attribution)),
        peak=peak(attribution).item(),
        sentence=diagnose(attribution, logits, class_idx),
    )


def stages_answer(image: Image.Image, model: nn.Module) -> tuple[Image.Image, Image.Image, list[StageMap]]:
    """Input, predicted mask, and Grad-CAM of the mask at every stage, from one forward and one backward pass.

    Raises:
        ValueError: the model has no mask to explain: it is a classifier, or found nothing.
    """
    if model.task != "segmentation":
        raise ValueError(
            "This model is a classifier: it has no mask and no U-Net stages. "
            "Its own stages can be chosen in the Grad-CAM tab."
        )
    images = view(image, model)
    explanation = explain(model, images, predicted_score(model))
    mask = predicted_masks(model, explanation.logits)[0, 0]
    stages = [
        StageMap(
            name=name,
            resolution=f"{attribution.shape[-1]} x {attribution.shape[-2]}",
            overlay=enlarged(overlay(images, attribution)),
            peak=peak(attribution).item(),
            sentence=diagnose(attribution, explanation.logits),
        )
        for name, attribution in explanation.maps["grad_cam"].items()
    ]
    photo = to_picture(images)
    return enlarged(photo), enlarged(mask_overlay(photo, mask.numpy())), stages


def class_index(model: nn.Module, class_name: str | None) -> int | None:
    """The index of a class by its name; None stands for the predicted class."""
    if not class_name:
        return None
    if class_name not in model.class_names:
        raise ValueError(f"The model has no class {class_name!r}; it has {', '.join(model.class_names[:20])}.")
    return model.class_names.index(class_name)


def enlarged(image: Image.Image) -> Image.Image:
    """A small view at least LEAST_SIDE wide, by a whole factor."""
    factor = -(-LEAST_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
