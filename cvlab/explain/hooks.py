"""One forward and one backward pass of a model in eval mode, by Captum, with everything a map is made of.

One thread at a time; hooks and training modes are always restored, also after an error, and no gradients are stored.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from cvlab.models import Model

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()

LARGEST = 1e30  # of logits and maps: divided by a temperature, subtracted and added up they stay finite
# To autograd: a module that does not influence the score gets a gradient of 0, which `diagnose` explains.
UNUSED_IS_ZERO = {"allow_unused": True, "materialize_grads": True}


class Recorder:
    """A score as a function of images, as Captum wants it. It keeps what its last forward pass gave."""

    def __init__(self, model: Model, score: Callable[[Tensor], Tensor], modules: dict[str, nn.Module]) -> None:
        self.model, self.score = model, score
        self.activations: dict[str, Tensor] = {}  # each module's output by name, detached
        self.handles = [module.register_forward_hook(partial(self.record, name)) for name, module in modules.items()]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def __call__(self, images: Tensor) -> Tensor:
        """The scores (N,); ValueError if they have no gradient at all, or the images do not fit (see `forward`)."""
        with torch.no_grad():  # until the first module that is recorded: autograd stores nothing for earlier layers
            logits = forward(self.model, images)
        self.remove()  # a score that runs the model is not recorded
        scores = self.score(logits)
        if not scores.requires_grad:
            raise ValueError("The score has no gradient: the score or the model detaches or rounds its inputs.")
        self.logits, self.scores = (each.detach().to(images.device) for each in (logits, scores))  # (N, C, ...), (N,)
        return scores

    def record(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """A hook: records the output of a module, and switches gradients on from there."""
        torch.set_grad_enabled(True)
        self.activations[name] = output.detach()
        # A view: nn.Identity returns its input itself, whose gradient would include its other uses. Unlike view_as,
        # [...] keeps a single image in channels-last format, which saves a fourth of the time of a fused U-Net.
        return output[...]


@contextmanager
def recorded(
    model: Model, images: Tensor, score: Callable[[Tensor], Tensor], modules: dict[str, nn.Module]
) -> Iterator[tuple[Recorder, Tensor]]:
    """A Recorder of some modules, and a copy of the images that requires gradients, so that frozen models have them.

    Captum's own hooks come after these: it reads, and clones, what these return.
    """
    with alone_with(model), torch.inference_mode(False), torch.enable_grad():
        seen = Recorder(model, score, modules)
        try:
            yield seen, images.detach().clone().requires_grad_(images.is_floating_point())  # `forward` refuses others
        finally:
            seen.remove()


def passes(
    model: Model, images: Tensor, score: Callable[[Tensor], Tensor], modules: dict[str, nn.Module]
) -> tuple[Recorder, dict[str, Tensor]]:
    """One forward and one backward pass: what was recorded, and the score's gradients at the outputs of some modules.

    The gradients are Captum's LayerGradientXActivation without its multiplication, which takes many layers at once.

    `images` and `score` are as in `explain`, `modules` are by any name. ValueError as for a `Recorder`.
    """
    with recorded(model, images, score, modules) as (seen, images):
        method = LayerGradientXActivation(seen, list(modules.values()), multiply_by_inputs=False)
        gradients = method.attribute(images, grad_kwargs=UNUSED_IS_ZERO)
    return seen, dict(zip(modules, gradients, strict=True))


def forward(model: Model, images: Tensor) -> Tensor:
    """The logits of images (N, 3, S, S) in [0, 1], on the model's device; ValueError if it has none that are finite."""
    count = getattr(model, "in_channels", 3)
    if images.ndim != 4 or images.shape[1] != count or not images.is_floating_point():
        found = f"{tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
        raise ValueError(f"images must be floats (N, {count}, H, W) in [0, 1], not {found}: see cvlab.transforms.view")
    weight = next(model.parameters(), images)
    try:
        logits = model(images.to(weight.device))
    except (RuntimeError, AssertionError) as error:
        if weight.dtype != images.dtype:
            ours, theirs = (str(each.dtype).removeprefix("torch.") for each in (weight, images))
            raise ValueError(f"the model is {ours}, the images are {theirs}: call model.float()") from error
        height, width = images.shape[-2:]
        side = model.image_size
        if height == width == side:
            raise
        raise ValueError(f"the model is for {side}x{side} pixels and cannot take {height}x{width}") from error
    if not (logits.detach().abs() < LARGEST).all():  # NaN fails the comparison
        raise ValueError("the model's logits are not finite or beyond any sense: its weights are damaged")
    return logits


@contextmanager
def alone_with(model: Model) -> Iterator[None]:
    """A lock, because hooks act on every thread that runs the model; and eval mode, restored afterwards."""
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        training = [module for module in model.modules() if module.training]
        if training:  # model.eval() visits all modules: for a small network that takes longer than predicting
            model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
