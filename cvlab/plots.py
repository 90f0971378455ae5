"""Plots of scores: training curves, confusion matrices, calibration, thresholds."""

from collections.abc import Sequence
from io import BytesIO

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cvlab import fonts

SCORES = ("iou", "accuracy", "precision", "recall", "f1")  # a stranger's history may hold any others
MOST_NUMBERED = 40  # classes whose confusion matrix has a number in every cell
MOST_CELLS = 1000  # in a row of a drawn matrix, about as many as it has pixels


def curves(history: Sequence[dict], kept: int | None = None) -> Image.Image:
    """Loss and scores of training and validation over the epochs; the first score of the epoch `kept` is marked.

    Without `kept`, the epoch with the best validation score.
    """
    score = _score(history)
    others = [name for name in SCORES if name != score and f"val_{name}" in history[-1]]
    names = ["loss", score, *others]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in list(panels)[len(names) :]:
        axes.remove()
    for axes, name in zip(figure.axes, names, strict=True):
        for part, label, look in (("train", "training", "--"), ("val", "validation", "-")):
            _line(axes, history, f"{part}_{name}", look, color="#7a7a7a" if part == "train" else "#0072b2", label=label)
        axes.set_title(name)
    best = history[kept - 1] if kept else max(history, key=lambda line: line[f"val_{score}"])
    label = f"{'kept' if kept else 'best'}: {best[f'val_{score}']:.3f}"
    figure.axes[1].plot(best["epoch"], best[f"val_{score}"], "o", color="#0072b2", label=label)
    figure.axes[1].legend()
    return as_picture(figure)


def many_curves(histories: dict[str, Sequence[dict]], kept: dict[str, int], best: str | None = None) -> Image.Image:
    """Loss and score of many runs by epoch, for training and validation; the best run is drawn thick.

    Args:
        histories: histories[run], the lines of its history.jsonl.
        kept: kept[run], the epoch whose weights the run kept; a dot marks its validation score.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(histories)))
    for (run, history), color in zip(histories.items(), colors, strict=True):
        score = _score(history)
        at = next(line for line in history if line["epoch"] == kept[run])
        label, width = (f"{run}, best: {at[f'val_{score}']:.3f}", 3) if run == best else (run, 1)
        for row, part in zip(panels, ("train", "val"), strict=True):
            for axes, name in zip(row, ("loss", score), strict=True):
                _line(axes, history, f"{part}_{name}", "-", color=color, linewidth=width)
                axes.set_title(f"{name} on {'training' if part == 'train' else 'validation'}")
        panels[1, 1].plot(at["epoch"], at[f"val_{score}"], "o", color=color, ms=4)
        panels[0, 0].plot([], [], color=color, linewidth=width, label=label)
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 + len(histories) // 30)
    return as_picture(figure)


def _score(history: Sequence[dict]) -> str:
    """What decides between the epochs: iou of segmenters, which have an accuracy too."""
    return "iou" if "val_iou" in history[0] else "accuracy"


def _line(axes: matplotlib.axes.Axes, history: Sequence[dict], name: str, look: str, **style: object) -> None:
    """One entry of a history over the epochs; a line that was written without it leaves a gap."""
    axes.plot([line["epoch"] for line in history], [line.get(name, np.nan) for line in history], look, **style)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def confusion_picture(matrix: Tensor, class_names: Sequence[str]) -> Image.Image:
    """A confusion matrix: true classes in rows, predicted ones in columns, coloured by the share of the row.

    An empty cell has no pictures. Above MOST_NUMBERED classes no cell has a number, and small shares are darker.
    """
    n = len(class_names)
    many = n > MOST_NUMBERED
    side = 14 if many else 2.2 + 0.55 * n
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    block = -(-n // MOST_CELLS)  # of cells drawn as one, by the highest of them: none vanishes
    cells = F.max_pool2d(share[None], block, ceil_mode=True)[0]
    norm = PowerNorm(0.4 if many else 1, 0, 1)
    shown = axes.imshow(cells, "Blues", norm, interpolation="nearest", extent=(-0.5, n - 0.5, n - 0.5, -0.5))
    for i, j in [] if many else matrix.nonzero().tolist():
        color = "white" if share[i, j] > 0.6 else "black"
        axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color=color, in_layout=False)
    named = np.linspace(0, n - 1, min(n, MOST_NUMBERED)).round().astype(int).tolist()
    axes.set_xticks(named, [_short(class_names[i]) for i in named], rotation=60, ha="right")
    axes.set_yticks(named, [_short(class_names[i]) for i in named])
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(shown, label="share of the true class", shrink=0.8)
    return as_picture(figure)


def confused_pairs_picture(matrix: Tensor, class_names: Sequence[str], most: int = 30) -> Image.Image:
    """The pairs of classes that a confusion matrix, not diagonal, mixes up most often, as bars with their counts."""
    wrong = matrix.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().topk(min(most, int((wrong > 0).sum())))
    pairs = [divmod(cell, len(class_names)) for cell in cells.tolist()]
    figure = Figure(figsize=(9, 1 + 0.3 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(pairs)), counts, color="#0072b2")
    axes.bar_label(bars, [f"{count} of {int(matrix[i].sum())}" for count, (i, _) in zip(counts, pairs, strict=True)])
    axes.set_yticks(range(len(pairs)), [f"{_short(class_names[i])} as {_short(class_names[j])}" for i, j in pairs])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set(xlabel="pictures", title="the classes that are taken for one another most often")
    return as_picture(figure)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def reliability_picture(bins: np.ndarray, before: np.ndarray) -> Image.Image:
    """The rows of `cvlab.metrics.reliability` as bars, before calibration as a line; perfect is the diagonal."""
    confidence, accuracy, count = bins[bins[:, 2] > 0].T
    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#7a7a7a", label="perfectly calibrated")
    colors = [(0, 0.45, 0.7, 0.25 + 0.75 * share) for share in count / count.max()]
    axes.bar(confidence, accuracy, width=0.9 / len(bins), color=colors)
    confidence, accuracy, _ = before[before[:, 2] > 0].T
    axes.plot(confidence, accuracy, ".-", color="#d55e00", label="logits as they are")
    axes.set(xlabel="confidence of the prediction", ylabel="share of right predictions")
    axes.set_title("reliability (darker: more images)")
    axes.legend()
    return as_picture(figure)


def lines_picture(lines: dict[str, tuple], at: float, xlabel: str) -> Image.Image:
    """Lines by name, each its x and y, and a dashed one at the x in use."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=name)
    axes.axvline(at, color="#7a7a7a", linestyle="--", label=f"in use: {at:g}")
    axes.set(xlabel=xlabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return as_picture(figure)


def scores_by_number(points: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> Image.Image:
    """What a number does to a score: (number, score) of each run as a dot, and by name a line through their means."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, runs in points.items():
        xs = sorted({x for x, _ in runs})
        (line,) = axes.plot(xs, [np.mean([y for x, y in runs if x == each]) for each in xs], label=name or "mean")
        axes.plot(*zip(*runs, strict=True), "o", color=line.get_color(), alpha=0.5)
    if min(xs) > 0 and max(xs) >= 8 * min(xs):
        axes.set_xscale("log")
        axes.set_xticks(xs, [f"{each:g}" for each in xs], minor=False)
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return as_picture(figure)


def as_picture(figure: Figure) -> Image.Image:
    """A figure of matplotlib as a picture, PIL RGB."""
    buffer = BytesIO()
    fonts.prepared(figure).savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")
