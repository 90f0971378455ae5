"""Pictures: colours for maps, overlays, masks, training curves, confusion matrices.

A map is divided by its maximum at most, never by min-max: zero evidence stays zero and leaves the photo as it is.
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

from cvlab.explain import heatmap
from cvlab.files import write_bytes

COLORMAP = "inferno"  # perceptually uniform, reads the same to the colour-blind, starts at black for zero


def to_picture(images: Tensor) -> Image.Image:
    """(1, 3, H, W) or (3, H, W) in [0, 1] to PIL RGB."""
    pixels = images.detach().reshape(3, *images.shape[-2:]).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))


def relative_heat(attribution: Tensor, size: Sequence[int], maximum: float | None = None) -> np.ndarray:
    """The positive part of a map (1, 1, h, w) at `size` (H, W), divided by its maximum: (H, W) in [0, 1].

    Args:
        maximum: divide by this instead, to show several maps of one stage on a common scale.
    """
    heat = heatmap(attribution.detach().reshape(1, 1, *attribution.shape[-2:]).float(), size)[0, 0].cpu().numpy()
    maximum = float(heat.max()) if maximum is None else maximum
    return np.clip(heat / maximum, 0, 1) if maximum > 0 else np.zeros_like(heat)


def heatmap_picture(
    attribution: Tensor, size: Sequence[int], colormap: str = COLORMAP, maximum: float | None = None
) -> Image.Image:
    """The map alone, in colours from zero to its maximum."""
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
    """(H, W) in [0, 1] as one of 256 levels each, as matplotlib chooses them."""
    return Image.fromarray(np.minimum(heat * 256, 255).astype(np.uint8))


def _coloured(levels: Image.Image, colormap: str) -> Image.Image:
    levels = levels.copy()
    levels.putpalette(_palette(colormap))
    return levels.convert("RGB")


@lru_cache
def _palette(colormap: str) -> bytes:
    """The colours of all levels. Matplotlib makes them anew for every picture."""
    return np.uint8(np.round(matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255)).tobytes()


def mask_overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A mask (H, W) bool on an image of the same size: as it is inside, pale grey outside, a dark line between.

    A tint would be lost on objects of its own colour.
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
    """A small view at least so many pixels wide, by a whole factor."""
    factor = -(-least // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _edge(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1, mode="edge")
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def row(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures side by side under their titles."""
    return grid(images, titles, len(images))


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
    """Pictures side by side, each `side` pixels wide under its title: plainer than `row`, and drawn in a moment."""
    drawn = Image.new("RGB", (side * len(images), side + 34), "white")
    pen = ImageDraw.Draw(drawn)
    pen.text((4, 2), heading, fill="black")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        pen.text((side * i + 4, 17), title[:24], fill="black")
        drawn.paste(image.resize((side, side), Image.Resampling.BILINEAR), (side * i, 34))
    return drawn


def save_animation(frames: Sequence[Path], path: Path, seconds: float = 12) -> None:
    """Pictures of one size as an animated WebP that lasts about `seconds`, and rests at the end."""
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
    axes.plot(
        best["epoch"],
        best[f"val_{score}"],
        "o",
        color="#0072b2",
        label=f"{'kept' if kept else 'best'}: {best[f'val_{score}']:.3f}",
    )
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
        axes.plot(line.keys(), line.values(), color=color, linewidth=width, label=label, marker="o", markevery=dot)
    axes.set_xlabel("epoch")
    axes.set_title("score on validation")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 + len(scores) // 20)
    return _drawn(figure)


def confusion_picture(matrix: Tensor, class_names: Sequence[str]) -> Image.Image:
    """A confusion matrix: rows are true classes, columns predicted ones, colours the share of the row."""
    side = 2.2 + 0.55 * len(class_names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in torch.cartesian_prod(torch.arange(len(matrix)), torch.arange(len(matrix))).tolist():
        axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.6 else "black")
    axes.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(drawn, label="share of the true class", shrink=0.8)
    return _drawn(figure)


def reliability_picture(bins: np.ndarray) -> Image.Image:
    """The rows of `cvlab.calibration.reliability` as bars against the diagonal of perfect calibration."""
    confidence, accuracy, count = bins[bins[:, 2] > 0].T
    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#7a7a7a", label="perfectly calibrated")
    colors = [(0, 0.45, 0.7, 0.25 + 0.75 * share) for share in count / count.max()]
    axes.bar(confidence, accuracy, width=0.9 / len(bins), color=colors)
    axes.set_xlabel("confidence of the prediction")
    axes.set_ylabel("share that is right")
    axes.set_title("reliability (darker: more images)")
    axes.legend()
    return _drawn(figure)


def threshold_picture(thresholds: Sequence[float], ious: Sequence[float], chosen: float) -> Image.Image:
    """iou over the threshold of the mask."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(thresholds, ious, color="#0072b2")
    axes.axvline(chosen, color="#7a7a7a", linestyle="--", label=f"in use: {chosen:g}")
    axes.set_xlabel("threshold")
    axes.set_ylabel("iou on val")
    axes.grid(alpha=0.3)
    axes.legend()
    return _drawn(figure)


def contribution_bars(parts: dict[str, float], score: float) -> Image.Image:
    """Signed parts of a score as bars from zero, in their order from above, and the score that they add up to."""
    figure = Figure(figsize=(5.6, 1.2 + 0.32 * len(parts)), layout="constrained")
    axes = figure.subplots()
    names, values = [*parts, "score"], [*parts.values(), score]
    colors = ["#0072b2" if value >= 0 else "#d55e00" for value in parts.values()] + ["#4a4a4a"]
    bars = axes.barh(range(len(names)), values, color=colors)
    axes.bar_label(bars, fmt="{:+.3g}", padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.15)  # room for the numbers
    axes.set_xlabel("contribution to the score (orange: against it)")
    return _drawn(figure)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG whole or not at all."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _drawn(figure: Figure) -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")
