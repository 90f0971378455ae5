"""What the page and its API answer for a photo: prediction, Grad-CAM of one stage, and every stage of a U-Net."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn

from cvlab.explain import diagnose, explain, grad_cam, peak, predict, predicted_masks, region_score
from cvlab.render import heatmap_picture, mask_overlay, overlay, to_picture
from cvlab.transforms import resize_logits, view

LEAST_SIDE = 320  # views of small models are enlarged to this for display
MOST_SIDE = 1024  # and photos reduced to this


@dataclass
class GradCam:
    """One stage's answer for one class: three pictures of the same view, the peak, and a sentence on trust."""

    original: Image.Image
    heatmap: Image.Image
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


def grad_cam_answer(image: Image.Image, model: nn.Module, class_name: str | None, stage: str | None) -> GradCam:
    """Grad-CAM for a class (None: the predicted one) at a stage (None: the deepest)."""
    class_idx = class_index(model, class_name)
    images = view(image, model)
    logits, attribution = grad_cam(model, images, class_idx, stage or None)
    return GradCam(
        enlarged(to_picture(images)),
        enlarged(heatmap_picture(attribution, images.shape[-2:])),
        enlarged(overlay(images, attribution)),
        peak(attribution).item(),
        diagnose(attribution, logits, class_idx or 0),
    )


def stages_answer(image: Image.Image, model: nn.Module) -> tuple[Image.Image, Image.Image, list[tuple], str]:
    """Input, mask, (picture, caption) of every stage, and the sentences on those that need one.

    Raises:
        ValueError: the model has no mask to explain: it is a classifier, or found nothing.
    """
    if model.task != "segmentation":
        raise ValueError(
            "This model is a classifier: it has no mask and no U-Net stages. "
            "Its own stages can be chosen in the Grad-CAM tab."
        )
    images = view(image, model)
    region: dict[str, Tensor] = {}

    def mask_score(logits: Tensor) -> Tensor:
        region["mask"] = predicted_masks(model, logits)[:, 0]
        return region_score(region["mask"])(logits)

    explanation = explain(model, images, mask_score)
    captioned, sentences = [], []
    for name, attribution in explanation.maps["grad_cam"].items():
        height, width = attribution.shape[-2:]
        picture = enlarged(overlay(images, attribution))
        captioned.append((picture, f"{name}: {width} x {height}, peak {peak(attribution).item():.2f}"))
        if sentence := diagnose(attribution, explanation.logits):
            sentences.append(f"- **{name}**: {sentence}")
    photo = to_picture(images)
    mask = enlarged(mask_overlay(photo, region["mask"][0].numpy()))
    return enlarged(photo), mask, captioned, "\n".join(sentences)


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
