"""Optimizers and learning-rate schedules by name, and which numeric precision trains fastest here."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from cvlab.models import Model

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
}
WITH_MOMENTUM = ("sgd", "nesterov", "rmsprop")
SCHEDULES = ("onecycle", "cosine", "step", "plateau", "constant")
STEP_EPOCHS = 10  # after which "step" takes a tenth of the rate


def optimizer(
    name: str,
    model: Model,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    factors: dict[str, float] | None = None,
    fused: bool = False,
) -> Optimizer:
    """An optimizer over the trainable parameters. `momentum` is for those of WITH_MOMENTUM.

    Biases and the factors of normalisation layers (all parameters of one dimension) are not decayed: pulling them to
    zero does not make a function smoother.

    Args:
        factors: of the learning rate of single parameters, by their names; 1 for those that are not named.
        fused: one kernel for all parameters, for a GPU; torch has none for rmsprop. On a CPU it reads a gradient
            wrongly whose memory is laid out otherwise than its parameter's.
    """
    trainable = [((factors or {}).get(n, 1.0), p.ndim > 1, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for each, matrix, p in trainable if (each, matrix) == (factor, decayed)],
            "lr": lr * factor,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for factor in sorted({factor for factor, _, _ in trainable}, reverse=True)
        for decayed in (True, False)
    ]
    settings = {"momentum": momentum} if name in WITH_MOMENTUM else {}
    if name != "rmsprop":
        settings["fused"] = fused
    return OPTIMIZERS[name](groups, lr=lr, **settings)


def schedule(
    name: str, optimizer: Optimizer, steps: int, steps_per_epoch: int = 1, div_factor: float = 25.0
) -> LRScheduler:
    """A schedule that is stepped after every batch; "plateau" instead after every epoch, with its validation loss.

    Args:
        name: "onecycle" rises to the optimizer's rate over 30% of the steps and falls to nothing along a cosine
            (Smith and Topin, "Super-Convergence", 2018; the momentum stays as it is); "cosine" falls to zero from the
            first step on; "step" takes a tenth after every STEP_EPOCHS epochs; "plateau" takes a tenth when 10 epochs
            have brought no smaller loss; "constant" keeps the rate.
        steps: all batches of the training.
        steps_per_epoch: batches of one epoch.
        div_factor: "onecycle" starts at the rate divided by it.
    """
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    if name == "step":
        return StepLR(optimizer, STEP_EPOCHS * steps_per_epoch, gamma=0.1)
    if name == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=10)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    shape = {"total_steps": steps, "pct_start": 0.3, "div_factor": div_factor, "cycle_momentum": False}
    return OneCycleLR(optimizer, max_lr=peaks, **shape)


def fastest_precision(model: Model, images: Tensor, criterion: Callable[[Tensor], Tensor], repeats: int = 3) -> str:
    """ "bf16" where forward and backward under bfloat16 autocast take less time on this CPU than in float32, or "fp32".

    Narrow networks are often slower in bfloat16, so it is measured: the best of `repeats` steps each, after
    one to warm up. The model's weights, gradients and statistics and torch's random numbers are left as they were.

    Args:
        images: one training batch (N, 3, S, S).
        criterion: logits to a loss.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    seconds = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.random.fork_rng():
        for repeat in range(repeats + 1):
            for precision in seconds:
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = criterion(model(images).float())
                torch.autograd.grad(loss, trainable, allow_unused=True)
                if repeat > 0:
                    seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    model.load_state_dict(before)
    return min(seconds, key=seconds.get)
