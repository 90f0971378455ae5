"""What each way through a U-Net contributed to a score: the skips, the bottleneck, and the biases, which add up to it.

The part of a U-Net above the cut through all skips and the bottleneck's output is piecewise linear: convolutions, batch
normalisation in eval mode, ReLU, concatenation. Such a function equals its gradient times its inputs plus, for every
bias in it, the bias times the gradient there (Euler's theorem; Srinivas and Fleuret, "Full-Gradient Representation for
Neural Network Visualization", 2019). So the score falls into signed parts, with nothing left over. A part is no share:
parts may be negative, or larger than the score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvlab.explain.hooks import passes
from cvlab.explain.maps import correlation, explain
from cvlab.explain.scores import region_score
from cvlab.models import Model
from cvlab.models.unet import UNet

REST = 1e-3  # of the largest part: what rounding may leave over


@dataclass(frozen=True)
class Contributions:
    """The parts of a score.

    Attributes:
        logits: (N, C, H, W), detached.
        scores: (N,), what was explained.
        parts: (N,) each: "skip1" (the uppermost), "skip2", ..., "bottleneck", "biases"; their sum is the score.
    """

    logits: Tensor
    scores: Tensor
    parts: dict[str, Tensor]


def contributions(model: Model, images: Tensor, score: Callable[[Tensor], Tensor]) -> Contributions:
    """The signed parts of a score at the cuts of a U-Net, from one forward and one backward pass.

    Args:
        images: (N, 3, S, S) in [0, 1].
        score: logits to (N,), linear in them, as the scores of `cvlab.explain` are.

    Raises:
        ValueError: the model is no U-Net of cvlab, or the score is not linear in the logits (a probability).
    """
    if not isinstance(model, UNet):
        raise ValueError("only a U-Net has skips and a bottleneck that a score could be divided among")
    edges = {f"skip{i}": skip for i, skip in enumerate(model.skips, start=1)} | {"bottleneck": model.bottleneck}
    above = {
        f"{part}.{name}": module
        for part in ("ups", "decoders", "head")
        for name, module in getattr(model, part).named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d)
    }
    seen = passes(model, images, score, edges | above)
    parts = {name: (seen.activations[name] * seen.gradients[name]).sum((1, 2, 3)) for name in edges}
    parts["biases"] = sum(seen.gradients[name].sum((2, 3)) @ _shift(module) for name, module in above.items())
    each = torch.stack(list(parts.values()))
    if ((each.sum(0) - seen.scores).abs() > REST * each.abs().amax(0)).any():
        raise ValueError("the score is not linear in the logits, so it has no parts: explain logits, not probabilities")
    return Contributions(seen.logits, seen.scores, parts)


def _shift(module: nn.Module) -> Tensor:
    """What a layer adds to each of its channels, whatever comes in: (C,)."""
    if isinstance(module, nn.BatchNorm2d):
        scale = module.weight / (module.running_var + module.eps).sqrt()
        return (module.bias - module.running_mean * scale).detach()
    return module.weight.new_zeros(module.out_channels) if module.bias is None else module.bias.detach()


HARDLY = 0.95  # correlation between the maps of two regions from which a map says little of either


def region_dependence(
    model: Model,
    images: Tensor,
    region: Tensor,
    other: Tensor | None = None,
    class_idx: int = 0,
    stages: Sequence[str] | None = None,
    method: str = "grad_cam",
) -> dict[str, Tensor]:
    """For every stage Pearson's r between the maps of two regions, (N,) each; two forward and two backward passes.

    The second region is by default the complement of the first. Two halves of one object would be no test: they share
    their evidence, so their maps may rightly agree. An object and what surrounds it share the least, and a map that is
    the same for both depends on neither.

    Args:
        images: (N, 3, S, S) in [0, 1].
        region, other: bool, (S, S) for all images, or (N, S, S) or (N, 1, S, S).
        stages: keys of model.stages; by default all.

    Raises:
        ValueError: as `explain`; or a region that covers a whole image, where no other is given.
    """
    if other is None:
        other = ~region
        if not other.flatten(-2).any(-1).all():
            raise ValueError("the region covers the whole picture: give another one to compare its maps with")
    maps, others = (
        explain(model, images, region_score(each, class_idx), stages, [method]).maps[method] for each in (region, other)
    )
    return {stage: correlation(maps[stage], others[stage]) for stage in maps}


def dependence_sentence(r: float) -> str:
    """What to write beside a map whose `region_dependence` is r; empty where the region matters."""
    return f"This stage's map hardly depends on the region (r = {r:.2f})." if r > HARDLY else ""
