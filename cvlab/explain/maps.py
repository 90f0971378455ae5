"""Class activation maps at any stage of a model, for any score (scores.py), by two methods:

    grad_cam   a stage's activation, each channel weighted by the mean of its gradient
               (Selvaraju et al., "Grad-CAM", 2017; for segmentation Vinogradova et al., "Seg-Grad-CAM", 2020)
    hires_cam  activation times gradient at every pixel, summed over channels (Draelos and Carin, "HiResCAM", 2020)

Maps are raw and signed: negative values are evidence against the score. `heatmap` resizes the positive part to the
image. One thread at a time explains a model, and hooks and modes are always restored (hooks.py). A model works on the
device where it is; results come back to that of the images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor

from cvlab.explain.hooks import UNUSED_IS_ZERO, alone_with, forward, passes, recorded
from cvlab.explain.scores import Score, predicted_score, takes_wrapped
from cvlab.models import Model, Stage
from cvlab.models.model import identity

METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": lambda activation, gradient: (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True),
    "hires_cam": lambda activation, gradient: (gradient * activation).sum(1, keepdim=True),
}


@dataclass(frozen=True)
class Explanation:
    """The results of one forward and one backward pass."""

    logits: Tensor  # (N, C) or (N, C, H, W), detached
    scores: Tensor  # (N,), what was explained
    maps: dict[str, dict[str, Tensor]]  # maps[method][stage], signed (N, 1, h, w), float32, at the stage's resolution


@takes_wrapped
def predict(model: Model, images: Tensor) -> Tensor:
    """Logits in eval mode without gradients, while no other thread explains the same model."""
    with alone_with(model), torch.no_grad():
        return forward(model, images).to(images.device)


@takes_wrapped
def grad_cam(
    model: Model, images: Tensor, class_idx: int | Tensor | None = None, stage: str | None = None
) -> tuple[Tensor, Tensor]:
    """Prediction and Grad-CAM of one stage from a single forward pass.

    Args:
        images: (N, 3, S, S) in [0, 1].
        class_idx: the class to explain; by default the predicted one. For a segmenter the score is the mean logit over
            the predicted mask of this class, by default the one that covers most.
        stage: a key of model.stages; by default `default_stage(model)`.

    Returns:
        logits (N, C) or (N, C, H, W), and the signed map (N, 1, h, w).

    Raises:
        ValueError: an unknown stage or class, an empty predicted mask, or images that do not fit the model.
    """
    stage = stage or default_stage(model)
    explanation = explain(model, images, predicted_score(model, class_idx), [stage])
    return explanation.logits, explanation.maps["grad_cam"][stage]


@takes_wrapped
def explain(
    model: Model,
    images: Tensor,
    score: Score,
    stages: Sequence[str] | None = None,
    methods: Sequence[str] = ("grad_cam",),
) -> Explanation:
    """Maps of many stages and methods from one forward and one backward pass, by Captum.

    One stage's Grad-CAM is captum.attr.LayerGradCam; for more the gradients of all stages come from
    captum.attr.LayerGradientXActivation (`passes`), and METHODS makes maps of them.

    Args:
        images: (N, 3, S, S) in [0, 1].
        score: logits to (N,), one number per image that depends on this image only.
        stages: keys of model.stages; by default all.
        methods: keys of METHODS.

    Raises:
        ValueError: an unknown stage, class or method, an empty region, or images that do not fit the model.
    """
    known = model.stages
    stages = check_stages(model, stages or known)
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"unknown method “{unknown[0]}”; known are {', '.join(METHODS)}")
    modules = {name: known[name].module for name in stages}
    # LayerGradCam takes one layer, and would read tokens as channels.
    if list(methods) == ["grad_cam"] and len(stages) == 1 and known[stages[0]].to_map is identity:
        with recorded(model, images, score, modules) as (seen, images):
            attribution = LayerGradCam(seen, modules[stages[0]]).attribute(images, grad_kwargs=UNUSED_IS_ZERO)
        return Explanation(
            seen.logits, seen.scores, {"grad_cam": {stages[0]: attribution.detach().float().to(seen.logits.device)}}
        )
    seen, gradients = passes(model, images, score, modules)
    maps: dict[str, dict[str, Tensor]] = {method: {} for method in methods}
    for name in stages:
        to_map = known[name].to_map
        activation, gradient = to_map(seen.activations[name]), to_map(gradients[name])
        for method in methods:
            maps[method][name] = METHODS[method](activation, gradient).float().to(images.device)
    return Explanation(seen.logits, seen.scores, maps)


@takes_wrapped
def channel_maps(model: Model, images: Tensor, score: Score, stage: str) -> Tensor:
    """What each channel adds to the Grad-CAM of `explain`, with its arguments and errors: signed (N, C, h, w)."""
    read = model.stages[check_stages(model, [stage])[0]]
    seen, gradients = passes(model, images, score, {stage: read.module})
    activation, gradient = read.to_map(seen.activations[stage]), read.to_map(gradients[stage])
    return (gradient.mean((2, 3), keepdim=True) * activation).float().to(images.device)


@takes_wrapped
def default_stage(model: Model) -> str:
    """The last stage; of a U-Net its first decoder, whose maps are right more often (tests/bench/trust.py)."""
    stages = list(model.stages)
    return stages[stages.index("bottleneck") + 1 if "bottleneck" in stages else -1]


def heatmap(attribution: Tensor, size: Sequence[int], stage: Stage | None = None) -> Tensor:
    """The evidence for the score at image size: the positive part, resized to `size` (H, W): (N, 1, H, W).

    Args:
        attribution: (N, 1, h, w).
        size: of the view, or of any enlargement of it.
        stage: whose map it is. Each cell is drawn over the centre of its receptive field; without a stage the map is
            stretched over the view.
    """
    grid = stage and stage.grid
    if not grid:
        return F.interpolate(attribution.relu(), tuple(size), mode="bilinear", align_corners=False)
    axes = []
    for pixels, cells in zip(size, attribution.shape[-2:], strict=True):
        centres = (torch.arange(pixels, device=attribution.device) + 0.5) * grid.side / pixels - 0.5
        # grid_sample wants the first cell at -1 and the last at 1.
        axes.append((centres - grid.offset) / grid.stride * 2 / max(cells - 1, 1) - 1)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).expand(len(attribution), -1, -1, -1)
    return F.grid_sample(attribution.relu(), places.to(attribution), padding_mode="border", align_corners=True)


def peak(attribution: Tensor) -> Tensor:
    """The largest value of each map times h*w, (N,); 0 where no value is positive.

    Raw Grad-CAM shrinks with the number of positions of its stage; times h*w, peaks of different stages can be compared
    within one model and one score. Peaks of different models cannot.
    """
    return attribution.flatten(1).amax(1).relu() * attribution.shape[-2] * attribution.shape[-1]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r between the maps of each pair, (N, 1, h, w) both: (N,); 0 where one of them is constant."""
    a, b = a.flatten(1).double(), b.flatten(1).double()  # in float32 the squares of tiny numbers would be 0
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(1) / norms, 0.0).float()


@takes_wrapped
def check_stages(model: Model, stages: Sequence[str]) -> list[str]:
    """The names as a list; ValueError for a stage that the model does not have."""
    known = model.stages
    if unknown := [stage for stage in stages if stage not in known]:
        raise ValueError(f"this model has no stage “{unknown[0]}”; it has {', '.join(known)}")
    return list(stages)
