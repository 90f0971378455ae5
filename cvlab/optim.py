"""Optimizers and learning-rate schedules by name, and which numeric precision trains fastest here."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULES = ("onecycle", "constant")


def optimizer(name: str, model: nn.Module, lr: float, weight_decay: float = 0.0, momentum: float = 0.9) -> Optimizer:
    """An optimizer over the trainable parameters. `momentum` is SGD's (with Nesterov's step) and RMSprop's.

    Biases and the factors of normalisation layers (all parameters of one dimension) are not decayed: pulling them to
    zero does not make a function smoother.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    own = {"sgd": {"momentum": momentum, "nesterov": momentum > 0}, "rmsprop": {"momentum": momentum}}
    return OPTIMIZERS[name](groups, lr=lr, **own.get(name, {}))


def schedule(name: str, optimizer: Optimizer, steps: int) -> LRScheduler:
    """A schedule that is stepped after every batch.

    Args:
        name: "onecycle" rises to the optimizer's rate over 30% of the steps and falls to nothing along a cosine
            (Smith and Topin, "Super-Convergence", 2018; the momentum stays as it is); "constant" keeps it.
        steps: all batches of the training.
    """
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, pct_start=0.3, cycle_momentum=False)


def fastest_precision(model: nn.Module, images: Tensor, criterion: Callable[[Tensor], Tensor], repeats: int = 3) -> str:
    """ "bf16" where forward and backward under bfloat16 autocast take less time than in float32, else "fp32".

    Narrow networks on a CPU are often slower in bfloat16, so it is measured: the best of `repeats` steps each, after
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
                with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = criterion(model(images).float())
                torch.autograd.grad(loss, trainable, allow_unused=True)
                if images.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat > 0:
                    seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    model.load_state_dict(before)
    return min(seconds, key=seconds.get)
