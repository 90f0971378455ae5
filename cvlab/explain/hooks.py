"""Looking into a model without a trace: whoever looks is alone with it, and nothing of the look stays behind.

One thread at a time looks into a model, in eval mode; afterwards no hook, gradient or mode is left, also when something
failed on the way.
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
    """What one forward and one backward pass gave.

    Attributes:
        logits: (N, C) or (N, C, H, W), detached.
        scores: (N,), detached.
        activations, gradients: by the name of each module its output, and the score's gradient with respect to it.
    """

    logits: Tensor
    scores: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]


def passes(model: Model, images: Tensor, score: Callable[[Tensor], Tensor], modules: dict[str, nn.Module]) -> Passes:
    """One forward and one backward pass, and what was seen of them at some modules.

    Args:
        images: (N, 3, S, S) in [0, 1].
        score: logits to (N,), one number an image, each depending on its own image only.
        modules: by a name of the caller's choice.

    Raises:
        ValueError: the score has no gradient at all, or as `forward`.
    """
    with alone_with(model), differentiable(images) as images:
        with graph_from(modules.values()), recorded_outputs(modules) as outputs:
            logits = forward(model, images)
        scores = score(logits)
        if not scores.requires_grad:
            raise ValueError("The score has no gradient: it, or the model, detaches or rounds what it is made of.")
        # Materialised: a module that is cut off from the score has a gradient of zero, which `diagnose` can explain.
        wanted = [outputs[name] for name in modules]
        gradients = torch.autograd.grad(scores.sum(), wanted, allow_unused=True, materialize_grads=True)
    activations = {name: outputs[name].detach() for name in modules}
    return Passes(logits.detach(), scores.detach(), activations, dict(zip(modules, gradients, strict=True)))


def forward(model: Model, images: Tensor) -> Tensor:
    """The model's logits of images (N, 3, S, S) in [0, 1].

    Raises:
        ValueError: tensors of another shape or type, or of a size that the model cannot take.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
        raise ValueError(f"images are (N, 3, H, W) of floats in [0, 1], and not {found}: see cvlab.transforms.view")
    try:
        return model(images)
    except (RuntimeError, AssertionError) as error:
        height, width = images.shape[-2:]
        made_for = getattr(model, "image_size", height)
        if height == width == made_for:
            raise
        raise ValueError(f"the model is for {made_for}x{made_for} pixels and cannot take {height}x{width}") from error


@contextmanager
def alone_with(model: Model) -> Iterator[None]:
    """One thread at a time (hooks are seen by every thread that runs the model); eval mode, restored afterwards."""
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        training = [module for module in model.modules() if module.training]
        if training:  # a walk over all modules, which of a small network takes longer than its prediction
            model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def differentiable(images: Tensor) -> Iterator[Tensor]:
    """Gradients on, and a copy of the images that requires them: so stages of a frozen model have gradients too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield images.detach().clone().requires_grad_(images.is_floating_point())  # others are refused by `forward`


@contextmanager
def graph_from(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gradients on from the first of these modules that has run: of what lies below autograd keeps nothing."""

    def switch_on(module: nn.Module, inputs: tuple, output: object) -> None:
        torch.set_grad_enabled(True)

    with torch.no_grad():  # restores the mode in the end, whatever the hooks made of it
        handles = [module.register_forward_hook(switch_on, prepend=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def recorded_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each module puts out, by name. The network goes on with a clone: an in-place ReLU would overwrite it."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            # A view: nn.Identity puts out its very input, whose gradient would mix in what else is made of it. Unlike
            # view_as, [...] leaves a single image in channels last, which saves a fourth of the time of a folded U-Net.
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
