"""What surrounds a training loop: numeric precision, one or several processes, and a state that can be resumed."""

import copy
import os
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, broadcast_object_list
from PIL import Image
from resume import SUMS, checksums
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cvlab.files import beside, new_folder, read_json, to_json, write_text
from cvlab.models import Model


def processes(alone: bool = False) -> PartialState:
    """The processes that torchrun started, or one: they share the pictures by `cvlab.explain.many.shared`.

    Raises:
        ValueError: there are several, and what is asked for is the work of one, `alone`.
    """
    found = PartialState(cpu=not torch.cuda.is_available())
    if alone and found.num_processes > 1:
        raise ValueError("Several processes share the pictures of a part only: start this one without torchrun.")
    return found


def goes_on() -> bool:
    """Ends what several processes do together; True in the first one, which writes."""
    found = PartialState()
    found.wait_for_everyone()
    found.destroy_process_group()
    return found.is_main_process


def accelerator_for(
    model: Model, batch: tuple[Tensor, Tensor], criterion: Callable[..., Tensor], args: Namespace, state: Path | None
) -> Accelerator:
    """The Accelerator of a run. Several processes (`torchrun --nproc_per_node 2 train/...`) share each batch.

    Args:
        batch: images (N, 3, S, S) and targets, on which the precisions are timed.
        criterion: logits and targets to a loss.
        args: of the command line. --precision auto is bf16 on a GPU that supports it, on a CPU the faster one.
        state: that --resume continues from, with its precision.
    """
    # Without a GPU accelerate ignores torchrun unless it is told to use the CPU.
    cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    tracker = vars(args).get("track")
    if tracker and find_spec(tracker) is None:
        raise ValueError(f"--track {tracker} needs: pip install {tracker}")
    every = PartialState(cpu=cpu)
    precision = read_json(state / "progress.json")["precision"] if state else args.precision
    if precision == "auto" and every.device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif precision == "auto" and every.is_main_process:
        precision = fastest_precision(model, batch[0], lambda logits: criterion(logits, batch[1]))
    (precision,) = broadcast_object_list([precision])  # all do as the first one
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=args.seed)
    mixed = "no" if precision == "fp32" else "bf16"
    # Processes wait for the gradients of all parameters, and a frozen encoder gives none.
    some = [DistributedDataParallelKwargs(find_unused_parameters=True)] if vars(args).get("frozen_epochs") else []
    tracking = {"log_with": tracker, "project_dir": args.out} if tracker else {}
    return Accelerator(mixed_precision=mixed, dataloader_config=loading, cpu=cpu, kwargs_handlers=some, **tracking)


def start_tracking(accelerator: Accelerator, args: Namespace, epoch: int) -> None:
    """Opens the tracker of --track after `epoch` epochs: trackio's project is the folder around that of the run."""
    out, resumed = args.out.resolve(), "allow" if epoch else "never"
    settings = {"trackio": {"name": out.name, "resume": resumed}, "tensorboard": {"purge_step": epoch + 1}}
    config = {key: each if isinstance(each, int | float | str) else str(each) for key, each in vars(args).items()}
    accelerator.init_trackers(out.parent.name if args.track == "trackio" else args.track, config, settings)


def track(accelerator: Accelerator, epoch: int, numbers: dict, picture: Image.Image | None) -> None:
    """Gives an epoch to the trackers, if there are any."""
    for tracker in accelerator.trackers:
        if picture and tracker.name == "tensorboard":
            tracker.log_images({"picture": np.asarray(picture)[None]}, epoch, dataformats="NHWC")
        elif picture:
            tracker.log({"picture": import_module(tracker.name).Image(picture)}, epoch)
    accelerator.log(numbers, epoch)


def fastest_precision(model: Model, images: Tensor, criterion: Callable[[Tensor], Tensor], repeats: int = 3) -> str:
    """Returns "bf16" if a training step under bfloat16 autocast is faster on this CPU than in float32, else "fp32".

    Narrow networks are often slower in bfloat16, so it is measured: the best of `repeats` steps each, after one to warm
    up. The model's weights, gradients and statistics and torch's random numbers stay as they were.
    """
    model = copy.deepcopy(model)
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
            if max(seconds.values()) > 2 * min(seconds.values()):  # as on processors that emulate bfloat16
                break
    return min(seconds, key=seconds.get)


def with_common_statistics(accelerator: Accelerator, model: Model) -> nn.Module:
    """On several GPUs batch normalisation is over the batches of all; torch has that for GPUs only."""
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def save_state(accelerator: Accelerator, path: Path, progress: dict) -> None:
    """Saves weights, optimizer, schedule, random numbers and `progress` as a folder, whole or not at all."""
    alone = accelerator.is_main_process
    try:
        with new_folder(path) if alone else nullcontext(beside(path)) as folder:
            accelerator.wait_for_everyone()
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
            if alone:
                write_text(folder / "progress.json", to_json(progress))
                write_text(folder / SUMS, to_json(checksums(folder)))
    except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors raise on a full disk
        saved = [each.state_dict() for each in (*accelerator._models, *accelerator._optimizers)]
        needed = sum(leaf.nbytes for leaf in tree_leaves(saved) if torch.is_tensor(leaf)) / 1e6
        what = f"The state could not be written to {path}: it needs {needed:.2f} MB"
        raise OSError(f"{what}. Make room; --resume then continues from the last state that is whole.") from error
