"""Optimizers and learning-rate schedules by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

from cvlab.models import Model

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
}
DECAYS = ("weights", "all")
SCHEDULES = ("onecycle", "cosine", "step", "plateau", "constant")


def optimizer(
    name: str,
    model: Model,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    decay: str = "weights",
    factors: dict[str, float] | None = None,
    fused: bool = False,
) -> Optimizer:
    """An optimizer over the trainable parameters.

    Args:
        momentum: of sgd, nesterov and rmsprop.
        decay: "weights" leaves all parameters of one dimension out of weight decay: biases and the factors of
            normalisation layers, as pulling them to zero does not make a function smoother; "all" leaves out none.
        factors: of the learning rate of single parameters, by name; 1 for parameters that are not named.
        fused: one kernel for all parameters, for GPUs; torch has none for rmsprop. On a CPU torch reads gradients
            wrongly that have another memory layout than their parameter.
    """
    named, fewest = model.named_parameters(), 0 if decay == "all" else 2  # dimensions of what is decayed
    trainable = [((factors or {}).get(name, 1.0), p.ndim >= fewest, p) for name, p in named if p.requires_grad]
    groups = [
        {
            "params": [p for each, matrix, p in trainable if (each, matrix) == (factor, decayed)],
            "lr": lr * factor,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for factor in sorted({factor for factor, _, _ in trainable}, reverse=True)
        for decayed in (True, False)
    ]
    settings = {"momentum": momentum} if name in ("sgd", "nesterov", "rmsprop") else {}
    if name != "rmsprop":
        settings["fused"] = fused
    return OPTIMIZERS[name](groups, lr=lr, **settings)


class Plateau(ReduceLROnPlateau):
    """torch's, but step() without a loss does nothing, so that it can be called after every batch as well."""

    def step(self, loss: float | None = None) -> None:
        """Takes the validation loss of an epoch."""
        if loss is not None:
            super().step(loss)


def schedule(
    name: str, optimizer: Optimizer, steps: int, steps_per_epoch: int = 1, div_factor: float = 25.0
) -> LRScheduler:
    """A schedule that is stepped after every batch; "plateau" also after every epoch, with the validation loss.

    Args:
        name: "onecycle" rises to the optimizer's rate over 30% of the steps and falls to almost zero along a cosine
            (Smith and Topin, "Super-Convergence", 2018; momentum stays as it is); "cosine" falls to zero from the
            first step on; "step" divides by ten every 10 epochs; "plateau" divides by ten after 10
            epochs without a smaller loss; "constant" keeps the rate.
        steps: batches of the whole training.
        div_factor: "onecycle" starts at the rate divided by this.
    """
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    if name == "step":
        return StepLR(optimizer, 10 * steps_per_epoch, gamma=0.1)
    if name == "plateau":
        return Plateau(optimizer, factor=0.1, patience=10)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    shape = {"total_steps": steps, "pct_start": 0.3, "div_factor": div_factor, "cycle_momentum": False}
    return OneCycleLR(optimizer, max_lr=peaks, **shape)
