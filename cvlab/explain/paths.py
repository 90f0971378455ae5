"""What each path through a U-Net added to a score: the skips, the bottleneck and the biases.

The part of a U-Net after the skips and the bottleneck is piecewise linear: convolutions, batch normalisation in eval
mode, ReLU, concatenation. Such a function equals its gradient times its inputs plus, for every bias in it, the bias
times the gradient there (Euler's theorem; Srinivas and Fleuret, "Full-Gradient Representation for Neural Network
Visualization", 2019). So the score is the sum of signed parts. A part is not a share: it may be negative, or larger
than the score.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvlab.explain.hooks import passes
from cvlab.explain.maps import correlation, explain
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model

REST = 1e-3  # of the largest part: by how much rounding may change the sum


@takes_wrapped
def contributions(model: Model, images: Tensor, score: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The signed parts of a score at the cuts of a U-Net, from one forward and one backward pass, (N,) each.

    They are the skips from the uppermost on ("skip1", "skip2", ...), "bottleneck" and "biases"; their sum is the score.

    Args:
        images: (N, 3, S, S) in [0, 1].
        score: logits to (N,), linear in them, as the scores of `cvlab.explain` are.

    Raises:
        ValueError: the model is no U-Net, or the score is not linear in the logits (a probability).
    """
    if not hasattr(model, "cuts"):
        raise ValueError("only a U-Net has skips and a bottleneck that a score can be divided among")
    edges, after = model.cuts
    above = {
        f"{part}.{name}": module
        for part in after
        for name, module in model.get_submodule(part).named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d)
    }
    seen, gradients = passes(model, images, score, edges | above)
    parts = {name: (seen.activations[name] * gradients[name]).sum((1, 2, 3)) for name in edges}
    parts["biases"] = sum(gradients[name].sum((2, 3)) @ _shift(module) for name, module in above.items())
    parts = {name: part.to(seen.scores.device) for name, part in parts.items()}  # that of the images
    each = torch.stack(list(parts.values()))
    if ((each.sum(0) - seen.scores).abs() > REST * each.abs().amax(0)).any():
        raise ValueError("the score is not linear in the logits, so it has no parts: explain logits, not probabilities")
    return parts


def _shift(module: nn.Module) -> Tensor:
    """What a layer adds to each of its channels, whatever its input: (C,)."""
    if isinstance(module, nn.BatchNorm2d):
        scale = module.weight / (module.running_var + module.eps).sqrt()
        return (module.bias - module.running_mean * scale).detach()
    return module.weight.new_zeros(module.out_channels) if module.bias is None else module.bias.detach()


HARDLY = 0.95  # correlation between the maps of two regions from which on a map says little about either


def region_dependence(
    model: Model, images: Tensor, maps: dict[str, dict[str, Tensor]], elsewhere: Callable[[Tensor], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """By method and stage Pearson's r between the maps of a region and those of another one, (N,) each.

    The other region is best the complement. Two halves of one object would be no test: they share their evidence, so
    their maps may rightly agree. An object and its surroundings share the least: a map that is the same for both
    depends on neither. Takes one forward and one backward pass.

    Args:
        images: (N, 3, S, S) in [0, 1].
        maps: of the region, as `explain` gives them: maps[method][stage].
        elsewhere: the score of the other region.

    Raises:
        ValueError: as `explain`; the other region has no pixel.
    """
    stages = list(next(iter(maps.values())))
    others = explain(model, images, elsewhere, stages, list(maps)).maps
    return {
        method: {stage: correlation(attribution, others[method][stage]) for stage, attribution in each.items()}
        for method, each in maps.items()
    }


def dependence_sentence(r: float) -> str:
    """What to write beside a map whose `region_dependence` is r; empty where the region matters."""
    return f"This stage's map hardly depends on the region (r = {r:.2f})." if r > HARDLY else ""
