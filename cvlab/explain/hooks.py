"""Records activations and gradients of a model in eval mode.

One thread at a time; hooks and training modes are always restored, also after an error, and no gradients are stored.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cvlab.models import Model

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


@dataclass(frozen=True)
class Passes:
    """The results of one forward and one backward pass.

    Attributes:
        logits: (N, C) or (N, C, H, W), detached.
        scores: (N,), detached.
        activations, gradients: each module's output by name, and the score's gradient with respect to it.
    """

    logits: Tensor
    scores: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]


def passes(model: Model, images: Tensor, score: Callable[[Tensor], Tensor], modules: dict[str, nn.Module]) -> Passes:
    """One forward and one backward pass, with the outputs and gradients of some modules.

    Args:
        images: (N, 3, S, S) in [0, 1].
        score: logits to (N,), one number per image that depends on this image only.
        modules: by any name.

    Raises:
        ValueError: the score has no gradient at all, or the images do not fit the model (see `forward`).
    """
    with alone_with(model), differentiable(images) as images:
        with graph_from(modules.values()), recorded_outputs(modules) as outputs:
            logits = forward(model, images)
        scores = score(logits)
        if not scores.requires_grad:
            raise ValueError("The score has no gradient: the score or the model detaches or rounds its inputs.")
        # Materialised: a module that does not influence the score gets a gradient of 0, which `diagnose` explains.
        wanted = [outputs[name] for name in modules]
        gradients = torch.autograd.grad(scores.sum(), wanted, allow_unused=True, materialize_grads=True)
    activations = {name: outputs[name].detach() for name in modules}
    return Passes(logits.detach(), scores.detach(), activations, dict(zip(modules, gradients, strict=True)))


def forward(model: Model, images: Tensor) -> Tensor:
    """The model's logits of images (N, 3, S, S) in [0, 1].

    Raises:
        ValueError: another shape or type, an image size that the model cannot take, or a classifier's single logit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
        raise ValueError(f"images must be (N, 3, H, W) of floats in [0, 1], not {found}: see cvlab.transforms.view")
    try:
        logits = model(images)
        if logits.ndim == 2 and logits.shape[1] == 1:
            raise ValueError("the classifier has a single logit z, and softmax makes it 1: let it return -z/2 and z/2")
        return logits
    except (RuntimeError, AssertionError) as error:
        weight = next(model.parameters(), images)
        if (weight.dtype, weight.device) != (images.dtype, images.device):
            ours, theirs = (f"{str(each.dtype).removeprefix('torch.')} on {each.device}" for each in (weight, images))
            raise ValueError(
                f"the model is {ours}, the images are {theirs}: call model.float(), and move both to one device"
            ) from error
        height, width = images.shape[-2:]
        side = model.image_size
        if height == width == side:
            raise
        raise ValueError(f"the model is for {side}x{side} pixels and cannot take {height}x{width}") from error


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


@contextmanager
def differentiable(images: Tensor) -> Iterator[Tensor]:
    """Gradients on, and a copy of the images that requires them, so that stages of frozen models have gradients too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield images.detach().clone().requires_grad_(images.is_floating_point())  # `forward` refuses others


@contextmanager
def graph_from(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switches gradients on after the first of these modules: autograd stores nothing for earlier layers."""

    def switch_on(module: nn.Module, inputs: tuple, output: object) -> None:
        torch.set_grad_enabled(True)

    with torch.no_grad():  # restores the mode at the end, whatever the hooks did
        handles = [module.register_forward_hook(switch_on, prepend=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def recorded_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Each module's output by name. The network continues with a clone, which an in-place ReLU may overwrite."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            # A view: nn.Identity returns its input itself, whose gradient would include its other uses. Unlike view_as,
            # [...] keeps a single image in channels-last format, which saves a fourth of the time of a fused U-Net.
            outputs[name] = output[...]
            if not output.requires_grad:  # the graph begins here
                outputs[name].requires_grad_()
            return outputs[name].clone()

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(recorder(name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
