"""Every heatmap that tests/bench/trust.py judges: cvlab's, its peers', and some that know nothing of the model.

Peers are used and drawn as in their READMEs. LeGrad is not among them: it is for transformers, and neither
pytorch-grad-cam nor torchcam has it.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam
from pytorch_grad_cam import FinerCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, RefineCAM
from scipy import ndimage
from torch import Tensor
from torchcam.methods import GradCAM as TorchcamGradCAM
from torchcam.methods import LayerCAM as TorchcamLayerCAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: cvlab needs no installation

from cvlab.explain import METHODS, class_score, default_stage, heatmap, region_score
from cvlab.explain.hooks import passes
from cvlab.models import Model, Stage
from cvlab.models.model import identity

Maps = Iterator[tuple[str, str, np.ndarray]]  # method, stage, heatmaps (N, H, W) >= 0


class Mosaic(Model):
    """2 x 2 pictures beside each other, of which the model sees each alone; the logits are those of the first."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.task = model, model.task
        self.class_names, self.image_size, self.threshold = model.class_names, 2 * model.image_size, model.threshold

    @property
    def stages(self) -> dict[str, Stage]:
        return {name: Stage(stage.module, beside) for name, stage in self.model.stages.items()}

    def forward(self, images: Tensor) -> Tensor:
        cells = images.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.model(cells).unflatten(0, (-1, 4))[:, 0]


def beside(cells: Tensor) -> Tensor:
    """(4 * N, C, h, w) to (N, C, 2 * h, 2 * w)."""
    return cells.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@dataclass
class Question:
    """What is asked of N pictures: their classes (N,), or regions (N, S, S) of a segmenter's output."""

    classes: Tensor | None = None
    regions: Tensor | None = None

    @property
    def score(self) -> Callable[[Tensor], Tensor]:
        """As `cvlab.explain` takes it."""
        return class_score(self.classes) if self.regions is None else region_score(self.regions)

    @property
    def targets(self) -> list[Callable[[Tensor], Tensor]]:
        """One for each picture, of its logits alone, as the peers take it."""
        if self.regions is None:
            return [lambda logits, index=index: logits[index] for index in self.classes.tolist()]
        return [lambda logits, region=region: logits[0][..., region].mean() for region in self.regions]

    def at(self, which: slice) -> "Question":
        """The same of some of the pictures."""
        return Question(*(each if each is None else each[which] for each in (self.classes, self.regions)))

    def scores(self, logits: Tensor) -> Tensor:
        """What is asked of the only picture, of the logits (M, ...) of many."""
        many = (len(logits), *[-1] * (0 if self.regions is None else 2))
        return Question(*(each if each is None else each.expand(many) for each in vars(self).values())).score(logits)


def ours(model: Model, images: Tensor, question: Question) -> Maps:
    """cvlab's methods at every stage from one pass, and LayerCAM made and drawn in the same way."""
    seen, gradients = passes(model, images, question.score, {name: at.module for name, at in model.stages.items()})
    kinds = {"cvlab Grad-CAM": METHODS["grad_cam"], "cvlab HiResCAM": METHODS["hires_cam"], "LayerCAM": layer_cam}
    for name, stage in model.stages.items():
        activation, gradient = stage.to_map(seen.activations[name]), stage.to_map(gradients[name])
        place = None if isinstance(model, Mosaic) else stage  # grids are those of a single picture
        for kind, method in kinds.items():
            yield kind, name, heatmap(method(activation, gradient), images.shape[-2:], place)[:, 0].numpy()


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Activation times positive gradient at every pixel, summed over channels (Jiang et al., "LayerCAM", 2021)."""
    return (gradient.relu() * activation).sum(1, keepdim=True)


def by_grad_cam(model: Model, images: Tensor, question: Question) -> Maps:
    """pytorch-grad-cam: the known methods at the default stage, RefineCAM of all stages."""
    last = default_stage(model)
    kinds = [(kind, [last]) for kind in (GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM)] + [(RefineCAM, [*model.stages])]
    kinds += [(FinerCAM, [last])] * (question.regions is None)  # it compares classes
    for kind, at in kinds:
        to_map = model.stages[last].to_map
        layers = [model.stages[stage].module for stage in at]
        cam = kind(model, layers, None if to_map is identity else to_map)
        # FinerCAM chooses the classes to compare with only where none is given; the predicted one is what is asked.
        heat = cam(images, None if kind is FinerCAM else question.targets)
        for each in getattr(cam, "base_cam_per_layer", [getattr(cam, "base_cam", cam)]):
            each.activations_and_grads.release()
        yield f"grad-cam {kind.__name__}", last if len(at) == 1 else "all", heat


def by_torchcam(model: Model, images: Tensor, question: Question) -> Maps:
    """torchcam, resized as its overlay does."""
    names, stage = {module: name for name, module in model.named_modules()}, default_stage(model)
    for kind in (TorchcamGradCAM, TorchcamLayerCAM):
        extractor = kind(model, names[model.stages[stage].module])
        logits = model(images)
        if question.regions is None:
            (small,) = extractor(question.classes.tolist(), logits)
        else:
            (small,) = extractor(scores=logits, targets=question.targets)
        extractor.remove_hooks()
        heat = F.interpolate(small.detach().nan_to_num()[:, None], images.shape[-2:], mode="bicubic").relu()
        yield f"torchcam {kind.__name__}", stage, heat[:, 0].numpy()


def by_captum(model: Model, images: Tensor, question: Question) -> Maps:
    """Captum's Grad-CAM, its evidence for the class resized as LayerAttribution does by default."""
    stage = default_stage(model)
    method = LayerGradCam(lambda images: question.score(model(images)), model.stages[stage].module)
    small = method.attribute(images, relu_attributions=True).detach()
    yield "Captum LayerGradCam", stage, LayerAttribution.interpolate(small, images.shape[-2:])[:, 0].numpy()


def references(images: Tensor, seeds: list[int]) -> Maps:
    """Maps that know nothing of the model: what they reach, a method has to beat."""
    size = images.shape[-1]
    noise = torch.stack([torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    yield "random blobs", "", F.interpolate(noise, size, mode="bicubic")[:, 0].relu().numpy()
    across = np.linspace(-1, 1, size)
    blob = np.exp(-2 * (across**2 + across[:, None] ** 2))
    yield "a blob in the middle", "", np.repeat(blob[None], len(images), 0)
    grey = images.mean(1).numpy()
    yield "edges", "", np.stack([ndimage.gaussian_gradient_magnitude(each, 1.0) for each in grey])


def all_maps(model: Model, images: Tensor, question: Question, peers: bool = True) -> dict[tuple[str, str], np.ndarray]:
    """The heatmaps of a model, (N, H, W), by method and stage."""
    makers = [ours, *[by_grad_cam] * peers]
    if peers and not isinstance(model, Mosaic):  # whose stages these two cannot rearrange
        makers += [by_torchcam, by_captum]
    return {(method, at): heat for make in makers for method, at, heat in make(model, images, question)}
