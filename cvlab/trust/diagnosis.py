"""Why a map is blank, inverted, tiny, or the same for every class: the first reason that is found, in a sentence.

`diagnose` reads a map and its logits. `diagnose_model` makes the map itself, and so also finds reasons in the input, in
the network and in the score. A sentence begins with the name of the reason and a colon:

    Not finite, Range, Constant image, Train mode, Saturated score, Dead stage, No gradient, Flatten head, Tiny,
    Same for every class (by `diagnose_model` alone); Blank, Coarse, Flat, Tautology, Inverted, Unsure
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cvlab.explain import (
    METHODS,
    check_stages,
    class_score,
    correlation,
    default_stage,
    explain,
    predict,
    predicted_score,
)
from cvlab.explain.hooks import differentiable, passes
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model

SAME = 0.999  # two maps with a higher correlation are the same
FLAT = 0.02  # a flat map varies by less than this share of its largest value
FOR_SHARE = 0.01  # an inverted map has less than this share of its evidence for the score
TINY = 1e-4  # of the score; a smaller map did not decide anything
GAP = 0.1  # difference of probabilities below which the network is unsure between two classes
COARSE = 2  # positions a side; a map with no more cannot show a place
FLATTENING = (torch.flatten, torch.reshape, Tensor.flatten, Tensor.reshape, Tensor.view)
FAITHFUL = 0.95  # correlation of Grad-CAM with HiResCAM from which Grad-CAM can be used under a flatten head


def diagnose(attribution: Tensor, logits: Tensor | None = None, class_idx: int = 0) -> str:
    """A warning about a map in a sentence, or "" if there is nothing to warn of.

    Args:
        attribution: the signed map of one image, (1, 1, h, w).
        logits: (1, C) or (1, C, H, W) at the model's temperature: show an unsure prediction, or a map that repeats it.
        class_idx: the class that was explained.
    """
    return next(_of_map(attribution, logits, class_idx), "")


@takes_wrapped
def diagnose_model(
    model: Model,
    images: Tensor,
    score: Callable[[Tensor], Tensor] | None = None,
    stage: str | None = None,
    method: str = "grad_cam",
) -> str:
    """The same for the map of a score at a stage, with reasons that only the model and the image can show.

    It takes two forward passes and one backward pass more than the map alone.

    Args:
        images: one image, (1, 3, S, S) in [0, 1].
        score: by default the score of the prediction.
        stage: a key of model.stages; by default `default_stage(model)`.
        method: a key of METHODS.

    Raises:
        ValueError: a stage or class that the model does not have, or an empty region.
    """
    (stage,) = check_stages(model, [stage or default_stage(model)])
    return next(_of_model(model, images, score or predicted_score(model), stage, method), "")


def score_map_correlation(attribution: Tensor, logits: Tensor, class_idx: int = 0) -> float:
    """Pearson's r between a segmenter's map and its own logits at the map's resolution; 0 for a flat map.

    If it is 1, the map only repeats the prediction and does not explain it. This is so at the last decoder stage under
    a 1x1 head, where Grad-CAM is a constant times (logit - bias) for every region.

    Args:
        attribution: (1, 1, h, w).
        logits: (1, C, H, W).
    """
    score_map = F.adaptive_avg_pool2d(logits[:, class_idx : class_idx + 1], attribution.shape[-2:])
    return correlation(attribution, score_map).item()


# --- reasons: the cause comes before its consequences -----------------------------------------------------------------


def _of_model(model: Model, images: Tensor, score: Callable, stage: str, method: str) -> Iterator[str]:
    yield from _of_input(images)
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        yield f"Not finite: the model's {broken[0]} holds NaN or infinity. Load or train the weights again."
    if any(module.training for module in model.modules()):
        yield "Train mode: dropout and batch statistics change the logits from call to call. Call model.eval()."
    logits = predict(model, images)
    if not logits.isfinite().all():
        yield "Not finite: the weights are finite, but the logits overflow. A layer explodes, or float16 does."

    place = model.stages[stage]
    seen, gradients = passes(model, images, score, {stage: place.module})
    activation, gradient = place.to_map(seen.activations[stage]), place.to_map(gradients[stage])
    of_logits = _gradient_of_score(score, logits)
    # A score that is linear in the logits equals the gradient times the logits, however small its factor is.
    if of_logits.abs().sum() < GAP and not torch.isclose((of_logits * logits).sum(), seen.scores.sum(), rtol=0.01):
        yield (
            "Saturated score: it hardly changes with the logits, like a probability near 1. "
            "Explain the logit instead (class_score)."
        )
    if not activation.any():
        yield f"Dead stage: every activation of {stage} is zero, as after a ReLU whose inputs are all negative."
    if not gradient.any():
        yield (
            f"No gradient: the output of {stage} does not reach the score. It is detached, later units are dead, or "
            "only the CLS token is used (then explain at the block's norm1)."
        )
    attribution = METHODS[method](activation, gradient)
    faithful = correlation(METHODS["grad_cam"](activation, gradient), METHODS["hires_cam"](activation, gradient))
    if method == "grad_cam" and faithful < FAITHFUL and _flattens(model, images):
        yield (
            "Flatten head: the linear layer has a weight for every position, but Grad-CAM averages over positions "
            f"(r = {faithful.item():.2f} with hires_cam, which does not). Use hires_cam."
        )
    largest = attribution.abs().max() * attribution.shape[-2] * attribution.shape[-1]
    if 0 < largest < TINY * seen.scores.abs().max():
        why = f"The score does not depend on {stage}: a shortcut or a skip goes around it."
        if method == "hires_cam":
            # A layer norm ignores the length of its input, so its gradient is perpendicular to its input.
            why = f"A skip goes around {stage}, or a layer norm makes activation times gradient 0 there. Use grad_cam."
        yield f"Tiny: at most {largest.item():.1e} of a score of {seen.scores.item():.1e}. {why}"
    yield from _of_map(attribution, logits / getattr(model, "temperature", 1.0), _explained_class(of_logits))
    if logits.ndim == 2 and logits.shape[1] > 1 and activation.shape[1] > 1:
        others = logits[0].topk(min(5, logits.shape[1])).indices
        maps = explain(model, images.expand(len(others), -1, -1, -1), class_score(others), [stage], [method])
        each = maps.maps[method][stage]
        if correlation(each[:1].expand_as(each), each).min() > SAME:
            yield (
                f"Same for every class: at {stage} the maps of the {len(others)} likeliest classes differ only by a "
                "factor. Choose a later stage, or ask why one class rather than another (contrast_score)."
            )


def _of_input(images: Tensor) -> Iterator[str]:
    if not images.isfinite().all():
        yield "Not finite: the image holds NaN or infinity."
    low, high = images.min().item(), images.max().item()
    if low < -0.01 or high > 1.01:
        cause = "Divide it by 255" if low >= 0 and high > 10 else "It was probably normalised twice"
        yield f"Range: the image has values from {low:.3g} to {high:.3g}, but the model expects [0, 1]. {cause}."
    if (images.amax((2, 3)) - images.amin((2, 3))).max() <= 1 / 255:
        yield "Constant image: every pixel has the same colour (or was divided by 255 twice)."


def _of_map(attribution: Tensor, logits: Tensor | None, class_idx: int | None) -> Iterator[str]:
    """Reasons that the numbers of a map show. Without a class, those that depend on it are not checked."""
    if not attribution.isfinite().all():
        yield "Not finite: the map holds NaN or infinity."
    largest = attribution.abs().max()
    if largest == 0:
        yield "Blank: all activations or all gradients of this stage are 0, so the score does not depend on it."
    if attribution.max() <= 0:
        yield "Blank: all evidence at this stage is against the score, and a heatmap shows only evidence for it."
    if max(attribution.shape[-2:]) <= COARSE:
        size = "x".join(map(str, attribution.shape[-2:]))
        yield f"Coarse: this stage has only {size} positions. Choose an earlier stage or a larger image."
    if logits is not None and logits.ndim == 4 and class_idx is not None:
        repeats = score_map_correlation(attribution, logits, class_idx)
        if repeats > SAME:
            yield "Tautology: this map is the prediction times a constant. It shows what was found, not why."
        if repeats < -SAME:
            yield "Inverted: this map is the prediction times a negative constant, brightest where nothing was found."
    if attribution.max() - attribution.min() < FLAT * largest:
        yield "Flat: the evidence is the same everywhere, so the map is bright everywhere and shows no place."
    share = (attribution.relu().sum() / attribution.abs().sum()).item()
    if share < FOR_SHARE:
        yield (
            f"Inverted: {1 - share:.1%} of the evidence is against the score, and the heatmap shows the rest. "
            "Ask for the evidence against it (against)."
        )
    if logits is not None and logits.ndim == 2 and logits.shape[1] > 1 and class_idx is not None:
        probs, likeliest = logits[0].softmax(0).topk(2)
        if probs[0] - probs[1] < GAP and class_idx in likeliest.tolist():
            yield (
                f"Unsure: class {likeliest[0]} ({probs[0]:.0%}) and class {likeliest[1]} ({probs[1]:.0%}) are almost "
                "equally likely. Ask why one rather than the other (contrast_score)."
            )


def _gradient_of_score(score: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    with differentiable(logits) as logits:
        return torch.autograd.grad(score(logits).sum(), logits)[0]


def _explained_class(of_logits: Tensor) -> int | None:
    """The class whose logits alone decide the score; None if other classes do as well."""
    others = of_logits.transpose(0, 1).flatten(1).any(1).nonzero()
    return int(others[0]) if len(others) == 1 else None


class _Flattened(TorchFunctionMode):
    """Notes whether, in its `with` block, maps (N, C, h, w) of several positions are made vectors (N, C*h*w)."""

    found = False

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        if function in FLATTENING and args and args[0].ndim == 4 and args[0].shape[2:].numel() > 1:
            self.found |= result.shape == args[0].flatten(1).shape
        return result


def _flattens(model: Model, images: Tensor) -> bool:
    with _Flattened() as seen:
        predict(model, images)
    return seen.found
