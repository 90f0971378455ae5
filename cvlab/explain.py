"""Why a model decided as it did: class activation maps at any of its stages.

What is explained is a score, a small function of the logits: a class (`class_score`), why one class rather than another
(`contrast_score`), or the pixels of a region (`region_score`). How it is explained is apart from that:

    grad_cam   a stage's activation, each channel weighted by the mean of its gradient
               (Selvaraju et al., "Grad-CAM", 2017; for segmentation Vinogradova et al., "Seg-Grad-CAM", 2020)
    hires_cam  activation times gradient at every pixel, summed over channels (Draelos and Carin, "HiResCAM", 2020)

Maps are raw and signed: negative values speak against the score. `heatmap` keeps the positive part at image size. One
thread at a time explains a model; afterwards no hook, gradient or mode is left behind, also when something failed.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from cvlab.models.stage import identity

Score = Callable[[Tensor], Tensor]

METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": lambda activation, gradient: (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True),
    "hires_cam": lambda activation, gradient: (gradient * activation).sum(1, keepdim=True),
}


@dataclass(frozen=True)
class Explanation:
    """What one forward and one backward pass gave.

    Attributes:
        logits: (N, C) or (N, C, H, W), detached.
        scores: (N,), what was explained.
        maps: maps[method][stage] is signed, (N, 1, h, w) at the stage's own resolution.
    """

    logits: Tensor
    scores: Tensor
    maps: dict[str, dict[str, Tensor]]


# --- scores: what is explained ----------------------------------------------------------------------------------------


def class_score(class_idx: int | Tensor) -> Score:
    """The logit of a class, (N, C) -> (N,). A tensor of N indices asks another class of each image."""

    def score(logits: Tensor) -> Tensor:
        # A clone: autograd refuses to keep a tensor that was made in inference mode.
        index = torch.as_tensor(class_idx, device=logits.device).clone().expand(len(logits))
        _check_class(index, logits)
        return logits.gather(1, index[:, None])[:, 0]

    return score


def contrast_score(a: int | Tensor, b: int | Tensor) -> Score:
    """Why class a rather than class b: the difference of their logits, (N, C) -> (N,)."""
    score_a, score_b = class_score(a), class_score(b)
    return lambda logits: score_a(logits) - score_b(logits)


def region_score(region: Tensor, class_idx: int = 0) -> Score:
    """The mean logit of a class over a region of the image, (N, C, H, W) -> (N,).

    The mean logit, not the sum of probabilities: the sigmoid's gradient vanishes where the network is sure, and a sum
    would make large regions look important.

    Args:
        region: bool, (H, W) for all images or (N, H, W) or (N, 1, H, W).

    Raises:
        ValueError: the region is not boolean, does not fit the logits, or has no pixel.
    """
    if region.dtype != torch.bool:
        raise ValueError(f"a region is a boolean mask, not {str(region.dtype).removeprefix('torch.')}")

    def score(logits: Tensor) -> Tensor:
        _check_class(torch.tensor([class_idx]), logits)
        chosen = logits[:, class_idx]  # (N, H, W)
        if region.shape[-2:] != chosen.shape[-2:]:
            size, expected = "x".join(map(str, region.shape[-2:])), "x".join(map(str, chosen.shape[-2:]))
            raise ValueError(f"the region is {size} pixels and the model's logits are {expected}")
        inside = region.to(logits.device, copy=True).reshape(-1, *region.shape[-2:])  # a copy: as in class_score
        if len(inside) not in (1, len(chosen)):
            raise ValueError(f"there are {len(inside)} regions for {len(chosen)} images")
        pixels = inside.sum((1, 2))
        if not pixels.all():
            raise ValueError("the region is empty: no pixel to explain")
        return (chosen * inside).sum((1, 2)) / pixels

    return score


def predicted_score(model: nn.Module, class_idx: int | Tensor | None = None) -> Score:
    """What the model itself says: the logit of a class, or the mean logit over the predicted mask of a class.

    Args:
        class_idx: by default a classifier's top class, or a segmenter's class 0.
    """

    def score(logits: Tensor) -> Tensor:
        if model.task == "classification":
            return class_score(logits.argmax(1) if class_idx is None else class_idx)(logits)
        index = class_idx or 0
        _check_class(torch.tensor([index]), logits)
        return region_score(predicted_masks(model, logits)[:, index], index)(logits)

    return score


def predicted_masks(model: nn.Module, logits: Tensor) -> Tensor:
    """Where the probability exceeds the model's threshold: (N, C, H, W) bool."""
    return logits.detach().sigmoid() > model.threshold


def _check_class(index: Tensor, logits: Tensor) -> None:
    unknown = index[(index < 0) | (index >= logits.shape[1])]
    if len(unknown):
        raise ValueError(f"there is no class {int(unknown[0])}: the model has {logits.shape[1]}, counted from 0")


# --- maps -------------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode without gradients, while nobody else explains the same model."""
    with _alone_with(model), torch.no_grad():
        return model(images)


def grad_cam(
    model: nn.Module, images: Tensor, class_idx: int | Tensor | None = None, stage: str | None = None
) -> tuple[Tensor, Tensor]:
    """Prediction and Grad-CAM of one stage from a single forward pass, by captum.attr.LayerGradCam.

    Args:
        images: (N, 3, S, S) in [0, 1].
        class_idx: the class to explain; by default the predicted one. Of a segmenter the mean logit over the predicted
            mask of this class is explained.
        stage: a key of model.stages; by default `default_stage(model)`.

    Returns:
        logits (N, C) or (N, C, H, W), and the signed map (N, 1, h, w).

    Raises:
        ValueError: a stage or class that the model does not have, or an empty predicted mask.
    """
    (stage,) = _check_stages(model, [stage or default_stage(model)])
    score = predicted_score(model, class_idx)
    if model.stages[stage].to_map is not identity:  # LayerGradCam would take tokens for channels
        explanation = explain(model, images, score, [stage])
        return explanation.logits, explanation.maps["grad_cam"][stage]
    recorded = []

    def score_of(images: Tensor) -> Tensor:
        logits = model(images)
        recorded.append(logits.detach())
        return score(logits)

    with _alone_with(model), _differentiable(images) as images:
        attribution = LayerGradCam(score_of, model.stages[stage].module).attribute(images)
    return recorded[0], attribution.detach()


def explain(
    model: nn.Module,
    images: Tensor,
    score: Score,
    stages: Sequence[str] | None = None,
    methods: Sequence[str] = ("grad_cam",),
) -> Explanation:
    """Maps of many stages and methods from one forward and one backward pass.

    Args:
        images: (N, 3, S, S) in [0, 1].
        score: logits to (N,), one number an image, each depending on its own image only.
        stages: keys of model.stages; by default all.
        methods: keys of METHODS.

    Raises:
        ValueError: a stage, class or method that is not there, or an empty region.
    """
    stages = _check_stages(model, stages or model.stages)
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
    with _alone_with(model), _differentiable(images) as images:
        with _recorded_outputs({name: model.stages[name].module for name in stages}) as outputs:
            logits = model(images)
        scores = score(logits)
        gradients = torch.autograd.grad(scores.sum(), [outputs[name] for name in stages])
    maps: dict[str, dict[str, Tensor]] = {method: {} for method in methods}
    for name, gradient in zip(stages, gradients, strict=True):
        to_map = model.stages[name].to_map
        activation, gradient = to_map(outputs[name].detach()), to_map(gradient)
        for method in methods:
            maps[method][name] = METHODS[method](activation, gradient)
    return Explanation(logits.detach(), scores.detach(), maps)


def default_stage(model: nn.Module) -> str:
    """Where a single Grad-CAM says most: a U-Net's bottleneck, else the last stage before the decision."""
    return "bottleneck" if "bottleneck" in model.stages else list(model.stages)[-1]


# --- reading maps -----------------------------------------------------------------------------------------------------


def heatmap(attribution: Tensor, size: Sequence[int]) -> Tensor:
    """The evidence for the score at image size: negative values to 0, bilinear to `size` (H, W). (N, 1, H, W) >= 0."""
    return F.interpolate(attribution.relu(), tuple(size), mode="bilinear", align_corners=False)


def peak(attribution: Tensor) -> Tensor:
    """(N,): the largest evidence of each map times h*w, 0 where there is none.

    Raw Grad-CAM shrinks with the number of positions of its stage; times h*w, peaks of different stages can be compared
    within one model and one score. Peaks of different models cannot.
    """
    return attribution.flatten(1).amax(1).relu() * attribution.shape[-2] * attribution.shape[-1]


def score_map_correlation(attribution: Tensor, logits: Tensor, class_idx: int = 0) -> float:
    """Pearson's r between a segmenter's map and its own logits at the map's resolution; 0 for a flat map.

    At 1 the map repeats what was predicted and says nothing about why: so it is at the last decoder stage under a 1x1
    head, where Grad-CAM is (logit - bias) times a constant, whatever region is asked about.

    Args:
        attribution: (1, 1, h, w).
        logits: (1, C, H, W).
    """
    score_map = F.adaptive_avg_pool2d(logits[:, class_idx : class_idx + 1], attribution.shape[-2:])
    a, b = attribution.flatten() - attribution.mean(), score_map.flatten() - score_map.mean()
    norm = (a.norm() * b.norm()).item()
    return (a @ b).item() / norm if norm > 0 else 0.0


def diagnose(attribution: Tensor, logits: Tensor | None = None, class_idx: int = 0) -> str:
    """A sentence on how far a map (1, 1, h, w) can be trusted to explain; empty where there is nothing to warn of.

    Args:
        logits: (1, C, H, W) of a segmenter, to recognise a map that only repeats the prediction.
    """
    if attribution.abs().max() == 0:
        return "Blank: this stage's activations or gradients are all zero, so nothing of the score passed through here."
    if attribution.max() <= 0:
        return "Blank: all evidence at this stage speaks against the score, and a heatmap shows only evidence for it."
    if logits is not None and logits.ndim == 4 and score_map_correlation(attribution, logits, class_idx) > 0.999:
        return "Tautology: this map is the prediction itself times a constant. It shows what was found, not why."
    return ""


# --- without a trace --------------------------------------------------------------------------------------------------

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


@contextmanager
def _alone_with(model: nn.Module) -> Iterator[None]:
    """One thread at a time (hooks are seen by every thread that runs the model); eval mode, restored afterwards."""
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _differentiable(images: Tensor) -> Iterator[Tensor]:
    """Gradients on, and a copy of the images that requires them: so stages of a frozen model have gradients too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield images.detach().clone().requires_grad_()


@contextmanager
def _recorded_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each module puts out, by name. The network goes on with a clone: an in-place ReLU would overwrite it."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            outputs[name] = output
            return output.clone()

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(recorder(name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _check_stages(model: nn.Module, stages: Sequence[str]) -> list[str]:
    if unknown := [stage for stage in stages if stage not in model.stages]:
        raise ValueError(f"this model has no stage {unknown[0]!r}; it has {', '.join(model.stages)}")
    return list(stages)
