"""The maps that tests/bench/attribution.py judges: of cvlab and its peers at every stage, and some that are useless.

Each maker takes a model, one picture (1, 3, S, S), what is asked of it and names of stages. Peers are used and drawn as
in their READMEs.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from explain import SHORTEST, seconds
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget
from torch import Tensor
from torchcam.methods import GradCAM as TorchcamGradCAM
from trust_maps import Question, references

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: cvlab needs no installation

from cvlab.explain import METHODS, explain, heatmap, predict
from cvlab.models import Model

TORCHCAM, GRAD_CAM, REGION = "torchcam GradCAM", "grad-cam GradCAM", "the region itself"
FORWARD = "forward"
Maps = dict[tuple[str, str], np.ndarray]  # by method and stage, (S, S) >= 0


def by_cvlab(model: Model, images: Tensor, asked: Question, stages: list[str], methods: list[str]) -> Maps:
    """As the page draws them."""
    maps, size = explain(model, images, asked.score, stages, methods).maps, images.shape[-2:]
    return {
        (method, stage): heatmap(small, size, model.stages[stage])[0, 0].numpy()
        for method in methods
        for stage, small in maps[method].items()
    }


def torchcam_draws(small: Tensor, size: int) -> np.ndarray:
    """A positive map (1, 1, h, w) as torchcam's overlay resizes it, (S, S)."""
    return F.interpolate(small - small.amin(), (size, size), mode="bicubic").relu()[0, 0].numpy()


def by_torchcam(model: Model, images: Tensor, asked: Question, stages: list[str]) -> Maps:
    """torchcam, the stages in one pass. Its division by the maximum is left out: no measure depends on it."""
    with TorchcamGradCAM(model, [model.stages[stage].module for stage in stages]) as extractor:
        found = extractor(scores=model(images), targets=asked.targets, normalized=False)
    drawn = (torchcam_draws(small.detach()[None], images.shape[-1]) for small in found)
    return {(TORCHCAM, stage): heat for stage, heat in zip(stages, drawn, strict=True)}


def grad_cam_draws(small: np.ndarray, size: int) -> np.ndarray:
    """A positive map (1, h, w) as pytorch-grad-cam resizes it, (S, S)."""
    return scale_cam_image(scale_cam_image(small, (size, size)))[0]


def by_grad_cam(model: Model, images: Tensor, asked: Question, stages: list[str]) -> Maps:
    """pytorch-grad-cam, the stages in one pass; of several it would give the mean, so that is left out."""
    with GradCAM(model=model, target_layers=[model.stages[stage].module for stage in stages]) as cam:
        cam.aggregate_multi_layers = lambda maps: [scale_cam_image(each[:, 0])[0] for each in maps]
        found = cam(images, [SemanticSegmentationTarget(0, asked.regions[0].float().numpy())])
    model.zero_grad()
    return {(GRAD_CAM, stage): heat for stage, heat in zip(stages, found, strict=True)}


def by_nobody(images: Tensor, asked: Question, seed: int) -> Maps:
    """What a useless map gets, and the region itself."""
    maps = {(method, ""): heat[0] for method, _, heat in references(images, [seed])}
    return {(REGION, ""): asked.regions[0].float().numpy()} | maps


def all_maps(model: Model, images: Tensor, asked: Question, seed: int) -> Maps:
    """Every map of one picture, by a row of the table."""
    stages = list(model.stages)
    maps = by_cvlab(model, images, asked, stages, list(METHODS))
    maps |= by_torchcam(model, images, asked, stages) | by_grad_cam(model, images, asked, stages)
    return maps | by_nobody(images, asked, seed)


def differences(model: Model, images: Tensor, asked: Question, maps: Maps) -> dict[str, float]:
    """Of each peer the largest difference to our Grad-CAM drawn in its way, as a share of the map's peak."""
    ours, size = explain(model, images, asked.score, methods=["grad_cam"]).maps["grad_cam"], images.shape[-1]
    found = {TORCHCAM: 0.0, GRAD_CAM: 0.0}
    for stage, small in ours.items():
        summed = small.relu() * asked.regions.sum()  # their target adds up what our score is the mean of
        drawn = {TORCHCAM: torchcam_draws(small.relu(), size), GRAD_CAM: grad_cam_draws(summed[0].numpy(), size)}
        for peer, heat in drawn.items():
            apart = np.abs(maps[peer, stage] - heat).max()
            found[peer] = max(found[peer], float(apart / heat.max()) if heat.any() else float(apart))
    return found


def times(model: Model, images: Tensor, asked: Question, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every map alone, its prediction included, and of the forward pass, in interleaved rounds."""
    calls: dict[str, Callable] = {FORWARD: lambda: predict(model, images)}
    for stage in model.stages:
        for method in METHODS:
            calls[f"{method} | {stage}"] = lambda at=stage, by=method: by_cvlab(model, images, asked, [at], [by])
        for peer, maker in ((TORCHCAM, by_torchcam), (GRAD_CAM, by_grad_cam)):
            calls[f"{peer} | {stage}"] = lambda at=stage, make=maker: make(model, images, asked, [at])
    repeats = {key: math.ceil(SHORTEST / seconds(call, 1)) for key, call in calls.items()}
    found: dict[str, list[float]] = {key: [] for key in calls}
    order, shuffled = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for key in order:
            found[key].append(seconds(calls[key], repeats[key]))
    return found
