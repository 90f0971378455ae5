"""Pictures: colours for maps, overlays, masks, training curves, and all that an evaluation shows.

A map is divided by its maximum, and its minimum is never subtracted: without evidence the photo stays as it is.
"""

from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from cvlab import fonts
from cvlab.explain import explain, grad_cam, heatmap, predict, predicted_masks, region_score
from cvlab.files import write_bytes
from cvlab.models import Model
from cvlab.transforms import to_float, whole_mask

COLORMAP = "inferno"  # perceptually uniform, safe for the colour-blind, black for zero


def to_picture(images: Tensor) -> Image.Image:
    """(1, 3, H, W) or (3, H, W) in [0, 1] to PIL RGB."""
    pixels = images.detach().reshape(3, *images.shape[-2:]).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))


def relative_heat(attribution: Tensor, size: Sequence[int], maximum: float | None = None) -> np.ndarray:
    """The positive part of a map (1, 1, h, w) at `size` (H, W), divided by its maximum: (H, W) in [0, 1].

    Args:
        maximum: divide by this number instead, to show several maps of one stage on a common scale.
    """
    heat = heatmap(attribution.detach().reshape(1, 1, *attribution.shape[-2:]).float(), size)[0, 0].cpu().numpy()
    maximum = float(heat.max()) if maximum is None else maximum
    return np.clip(heat / maximum, 0, 1) if maximum > 0 else np.zeros_like(heat)


def heatmap_picture(
    attribution: Tensor, size: Sequence[int], colormap: str = COLORMAP, maximum: float | None = None
) -> Image.Image:
    """The map alone, coloured from zero to its maximum."""
    return _coloured(_levels(relative_heat(attribution, size, maximum)), colormap)


def overlay(
    view: Tensor,
    attribution: Tensor,
    colormap: str = COLORMAP,
    opacity: float = 0.7,
    maximum: float | None = None,
) -> Image.Image:
    """A map over the view the network saw: (1, 3, H, W) in [0, 1] and (1, 1, h, w) to PIL RGB.

    The colour's opacity grows with the evidence, so a blank map leaves the picture unchanged.
    """
    levels = _levels(relative_heat(attribution, view.shape[-2:], maximum))
    alpha = levels.point([round(255 * opacity * (level / 255) ** 0.5) for level in range(256)])
    return Image.composite(_coloured(levels, colormap), to_picture(view), alpha)


def _levels(heat: np.ndarray) -> Image.Image:
    """(H, W) in [0, 1] to 256 levels, rounded as matplotlib rounds."""
    return Image.fromarray(np.minimum(heat * 256, 255).astype(np.uint8))


def _coloured(levels: Image.Image, colormap: str) -> Image.Image:
    levels = levels.copy()
    levels.putpalette(_palette(colormap))
    return levels.convert("RGB")


@lru_cache
def _palette(colormap: str) -> bytes:
    """The colours of the 256 levels: cached, because matplotlib would compute them for every picture."""
    return np.uint8(np.round(matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255)).tobytes()


def mask_overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A mask (H, W) bool on an image of the same size: inside unchanged, outside pale grey, a black line between.

    A colour tint would not show on objects of that colour.
    """
    pixels = np.asarray(image)
    grey = np.asarray(image.convert("L"))[..., None]
    shown = np.where(mask[..., None], pixels, 160 + 0.35 * grey)
    shown[_edge(mask)] = 0
    return Image.fromarray(np.round(shown).astype(np.uint8))


def outlined(image: Image.Image, region: np.ndarray) -> Image.Image:
    """An image with an orange line along the inner edge of a region (H, W) bool of the same size."""
    pixels = np.array(image)
    pixels[_edge(region)] = (255, 127, 14)
    return Image.fromarray(pixels)


def enlarged(image: Image.Image, least: int = 320) -> Image.Image:
    """An image enlarged by a whole factor, so that its longer side has at least so many pixels."""
    factor = -(-least // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _edge(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1, mode="edge")
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def grid(images: Sequence[Image.Image], titles: Sequence[str], columns: int) -> Image.Image:
    """Pictures under their titles, in rows of `columns`."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    return _drawn(figure)


def strip(images: Sequence[Image.Image], titles: Sequence[str], heading: str, side: int = 160) -> Image.Image:
    """Pictures side by side, each `side` pixels wide under its title. Plainer than `grid` and much faster."""
    drawn = Image.new("RGB", (side * len(images), side + 34), "white")
    pen = ImageDraw.Draw(drawn)
    pen.text((4, 2), heading, fill="black")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        pen.text((side * i + 4, 17), title[:24], fill="black", font=fonts.pillow_font(title[:24]))
        drawn.paste(image.resize((side, side), Image.Resampling.BILINEAR), (side * i, 34))
    return drawn


def save_animation(frames: Sequence[Path], path: Path, seconds: float = 12) -> None:
    """Pictures of one size as an animated WebP file that takes about `seconds` and stays on the last one for 2 s."""
    opened = [Image.open(frame).convert("RGB") for frame in frames]
    if not opened:
        return
    pace = max(40, min(600, int(1000 * seconds / len(opened))))
    buffer = BytesIO()
    durations = [pace] * (len(opened) - 1) + [2000]
    opened[0].save(buffer, "WEBP", save_all=True, append_images=opened[1:], duration=durations, loop=0, quality=80)
    write_bytes(path, buffer.getvalue())


def curves(history: Sequence[dict], kept: int | None = None) -> Image.Image:
    """Loss and score of training and validation over the epochs; the score of the epoch `kept` is marked.

    Without `kept`, the epoch with the best validation score.
    """
    score = "accuracy" if "val_accuracy" in history[0] else "iou"
    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", score), strict=True):
        axes.plot(epochs, [line[f"train_{name}"] for line in history], "--", color="#7a7a7a", label="training")
        axes.plot(epochs, [line[f"val_{name}"] for line in history], color="#0072b2", label="validation")
        axes.set_xlabel("epoch")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    best = history[kept - 1] if kept else max(history, key=lambda line: line[f"val_{score}"])
    label = f"{'kept' if kept else 'best'}: {best[f'val_{score}']:.3f}"
    axes.plot(best["epoch"], best[f"val_{score}"], "o", color="#0072b2", label=label)
    axes.legend()
    return _drawn(figure)


def many_curves(scores: dict[str, dict[int, float]], kept: dict[str, int], best: str | None = None) -> Image.Image:
    """The validation scores of many runs by epoch, in one picture; the best run is drawn thick.

    Args:
        scores: scores[run][epoch].
        kept: kept[run], the epoch whose weights the run kept; a dot marks it.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(scores)))
    for (run, line), color in zip(scores.items(), colors, strict=True):
        label, width = (f"{run}, best: {line[kept[run]]:.3f}", 3) if run == best else (run, 1)
        dot = [list(line).index(kept[run])]
        axes.plot(
            line.keys(), line.values(), color=color, linewidth=width, label=label, marker="o", ms=4, markevery=dot
        )
    axes.set_xlabel("epoch")
    axes.set_title("score on validation")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 + len(scores) // 20)
    return _drawn(figure)


def confusion_picture(matrix: Tensor, class_names: Sequence[str]) -> Image.Image:
    """A confusion matrix: true classes in rows, predicted ones in columns, coloured by the share of the row."""
    side = 2.2 + 0.55 * len(class_names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in torch.cartesian_prod(torch.arange(len(matrix)), torch.arange(len(matrix))).tolist():
        axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.6 else "black")
    axes.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(drawn, label="share of the true class", shrink=0.8)
    return _drawn(figure)


def reliability_picture(bins: np.ndarray) -> Image.Image:
    """The rows of `cvlab.metrics.reliability` as bars; perfect calibration is the diagonal."""
    confidence, accuracy, count = bins[bins[:, 2] > 0].T
    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#7a7a7a", label="perfectly calibrated")
    colors = [(0, 0.45, 0.7, 0.25 + 0.75 * share) for share in count / count.max()]
    axes.bar(confidence, accuracy, width=0.9 / len(bins), color=colors)
    axes.set(xlabel="confidence of the prediction", ylabel="share of right predictions")
    axes.set_title("reliability (darker: more images)")
    axes.legend()
    return _drawn(figure)


def threshold_picture(thresholds: Sequence[float], ious: Sequence[float], chosen: float) -> Image.Image:
    """The iou on val at each threshold of the mask."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(thresholds, ious, color="#0072b2")
    axes.axvline(chosen, color="#7a7a7a", linestyle="--", label=f"in use: {chosen:g}")
    axes.set(xlabel="threshold", ylabel="iou on val")
    axes.grid(alpha=0.3)
    axes.legend()
    return _drawn(figure)


# --- pictures of an evaluation: `views` are what the model saw, (N, 3, S, S) uint8 -----------------------------------


def misclassified(model: Model, views: Tensor, labels: Tensor, predicted: Tensor, most: int = 24) -> Image.Image:
    """The first `most` wrong images, each beside the evidence for the class that was wrongly predicted."""
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
    """Image, heatmap and overlay of the predicted class of each image, at a stage, by default the last."""
    drawn, captions = [], []
    for view, title in zip(views, titles, strict=True):
        images = to_float(view)[None]
        logits, attribution = grad_cam(model, images, stage=stage)
        heat = heatmap_picture(attribution, images.shape[-2:], colormap)
        drawn += [to_picture(images), heat, overlay(images, attribution, colormap, opacity)]
        captions += [title, "heatmap", f"why {model.class_names[logits.argmax()]}"]
    return grid(drawn, captions, 6)


def mask_pairs(model: Model, views: Tensor, masks: Sequence[Tensor], ious: Sequence[float]) -> Image.Image:
    """The true mask of each image beside the predicted one, with the iou of the image."""
    drawn, titles = [], []
    for view, mask, iou in zip(views, masks, ious, strict=True):
        images = to_float(view)[None]
        pair = whole_mask(mask, model.image_size), predicted_masks(model, predict(model, images))[0]
        drawn += [mask_overlay(to_picture(images), each.any(0).numpy()) for each in pair]
        titles += ["true mask", f"predicted, iou {iou:.3f}"]
    return grid(drawn, titles, 4)


def stage_rows(model: Model, views: Tensor, colormap: str = COLORMAP, opacity: float = 0.7) -> Image.Image:
    """Seg-Grad-CAM of the predicted mask: a row for each image, with input, mask and an overlay for every stage."""
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
    """A few images during a training: the evidence for the predicted class, or the masks and the evidence for them.

    Args:
        masks: a segmenter's true masks, (C, H, W) bool each.
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
    """Indices of images to explain: two of each of the first five classes, or six spread over all images."""
    if per_class:
        return torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()[:5]])
    return torch.linspace(0, len(labels) - 1, min(6, len(labels))).long()


# --- files ------------------------------------------------------------------------------------------------------------


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG whole or not at all."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _drawn(figure: Figure) -> Image.Image:
    buffer = BytesIO()
    fonts.prepared(figure).savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")
