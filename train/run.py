"""A training while it runs: its folder, the state that --resume goes on from, its processes, and what may stop it.

runs/NAME/config.json, model.safetensors   the best model so far (cvlab/checkpoint/)
runs/NAME/history.jsonl                    one line an epoch
runs/NAME/manifest.json                    command, seed, versions, hardware, minutes, peak memory (cli.py)
runs/NAME/report/                          curves; pictures with photographs in report/photos/
runs/NAME/state/step-N/                    what --resume goes on from
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from cvlab import checkpoint
from cvlab.files import beside, new_folder, write_text
from cvlab.learning.optim import fastest_precision
from cvlab.models import Model
from cvlab.models.timm import load_backbone, pretrained_weights, read_weights


class Stop:
    """Ctrl-C and SIGTERM as a question: `asked` is true once one came, so that the loop can finish its step and save.

    A second one stops at once. Of several processes none listens, since they would stop at different steps and wait
    for each other forever: they end at once, and --resume goes on from the last whole epoch.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.asked = False
        if accelerator.num_processes == 1:
            signal.signal(signal.SIGINT, self._hear)
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def open_run(args: argparse.Namespace) -> Path | None:
    """Makes the run folder, and returns the saved state to go on from: None to start at the beginning."""
    args.out.mkdir(parents=True, exist_ok=True)
    states = sorted((args.out / "state").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if args.resume:
        for left_over in args.out.rglob(".*.tmp"):  # of a run that was killed while it wrote
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
        return states[-1] if states else None
    if states:
        raise ValueError(f"{args.out} holds a run already: go on with --resume, or choose another --out.")
    (args.out / "history.jsonl").unlink(missing_ok=True)
    return None


def start_from(folder: Path, model: Model) -> None:
    """Gives a fresh model the weights of a trained one of the same network.

    Raises:
        ValueError: the other's tensors are of other names or shapes.
    """
    try:
        model.load_state_dict(checkpoint.load(folder).state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"--start-from {folder}: it is another network than the one asked for. {reason}") from error


def start_from_pretrained(args: argparse.Namespace, backbone: nn.Module) -> None:
    """Gives a network of timm the weights of --weights, else timm's own, from the Hub.

    Raises:
        ValueError, OSError: they cannot be had, or are of another network.
    """
    try:
        weights = read_weights(args.weights) if args.weights else pretrained_weights(args.backbone, args.image_size)
    except OSError as error:
        hint = "" if args.weights else ". Give a file of them with --weights, or begin with --no-pretrained."
        raise OSError(f"{error}{hint}") from error
    try:
        load_backbone(backbone, weights)
    except ValueError as error:
        raise ValueError(f"{args.weights or args.backbone} does not fit {args.backbone}: {error}.") from error


def accelerator_for(
    args: argparse.Namespace, model: Model, images: Tensor, criterion: Callable[[Tensor], Tensor]
) -> Accelerator:
    """The Accelerator of a run. Precision "auto" is measured on a CPU, bf16 on a GPU, and kept when resumed.

    Several processes (`torchrun --nproc_per_node 2 train/...`) share the batch, and take the precision of the first.
    """
    recorded = args.out / "state" / "precision.txt"
    processes = PartialState()
    with processes.main_process_first():
        known = args.resume or not processes.is_main_process
        if args.precision == "auto" and known and recorded.is_file():
            args.precision = recorded.read_text().strip()
        elif args.precision == "auto" and processes.device.type == "cuda":
            args.precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        elif args.precision == "auto":
            args.precision = fastest_precision(model, images, criterion)
        if processes.is_main_process:
            write_text(recorded, args.precision + "\n")
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=args.seed)
    return Accelerator(mixed_precision="no" if args.precision == "fp32" else "bf16", dataloader_config=loading)


def onto_gpu(accelerator: Accelerator, *data_sets: Dataset) -> None:
    """On a GPU that has room for the decoded pictures they are kept there, and cropped, turned and coloured there.

    Half of its free memory is left for the network.
    """
    if accelerator.device.type == "cuda":
        pictures = [image for data_set in data_sets for image in data_set.images]
        if sum(image.nbytes for image in pictures) < torch.cuda.mem_get_info(accelerator.device)[0] / 2:
            for data_set in data_sets:
                data_set.to(accelerator.device)


def whole_batches(batch_size: int, length: int) -> int:
    """The batch size, but no more than there are images, and even in each process: images are mixed in pairs.

    Raises:
        ValueError: there are fewer images than that takes.
    """
    least = 2 * int(os.environ.get("WORLD_SIZE", 1))
    if min(batch_size, length) < least:
        raise ValueError(f"A batch needs {least} images; there are {length}, and --batch-size is {batch_size}.")
    return min(batch_size, length) // least * least


def progress_bar(batches: Iterable, description: str, batch_size: int, done: int) -> Iterable:
    """The batches of an epoch behind a bar that shows images a second, the time left and the memory in use."""
    bar = tqdm(batches, description, done + len(batches), leave=False, unit=" images", unit_scale=batch_size)
    bar.update(done)
    for i, batch in enumerate(bar):
        if i % 10 == 0:
            bar.set_postfix_str(f"{peak_memory_mb()} MB", refresh=False)
        yield batch


def peak_memory_mb() -> int:
    """The most memory that this process has used so far, on a GPU that of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def check_finite(loss: float, epoch: int, out: Path) -> None:
    """Stops a training whose loss is no number before the weights take it in."""
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss became {loss} in epoch {epoch}: nothing more can be learned. Take a smaller --lr (a tenth), or "
            f"--precision fp32. The best model so far is in {out}."
        )


def save_state(accelerator: Accelerator, out: Path, step: int, progress: dict) -> None:
    """Saves everything that --resume needs as out/state/step-N, whole or not at all, and drops older ones.

    Raises:
        OSError: it cannot be written.
    """
    path = out / "state" / f"step-{step}"
    alone = accelerator.is_main_process
    with new_folder(path) if alone else nullcontext(beside(path)) as folder:
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(folder))
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            raise OSError(f"The state could not be written to {path}: is the disk full?") from error
        accelerator.wait_for_everyone()
        if alone:
            write_text(folder / "progress.json", json.dumps(progress))
    for other in (out / "state").glob("step-*") if alone else ():
        if other.name != path.name:
            shutil.rmtree(other)


def load_state(accelerator: Accelerator, state: Path) -> dict:
    """Restores weights, optimizer, schedule and random numbers; returns the progress that was saved with them."""
    accelerator.load_state(str(state))
    return json.loads((state / "progress.json").read_text())


def read_history(folder: Path) -> list[dict]:
    """The epochs of a run so far, as history.jsonl has them; [] before the first one."""
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_history(out: Path, history: list[dict]) -> None:
    """One JSON object a line."""
    write_text(out / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def print_epoch(line: dict, epochs: int, best: bool) -> None:
    """One aligned line an epoch; a star marks the best so far."""
    shown = {key: value for key, value in line.items() if key not in ("epoch", "lr", "seconds")}
    scores = "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items())
    star = "*" if best else " "
    tqdm.write(f"epoch {line['epoch']:>3}/{epochs}  {scores}  lr {line['lr']:.1e}  {line['seconds']:>6.1f} s {star}")
