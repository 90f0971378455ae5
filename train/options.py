"""What the training scripts share of their command line and of their run folder; nothing of their loop.

runs/NAME/config.json, model.safetensors   the best model so far (cvlab/checkpoint.py)
runs/NAME/history.jsonl                    one line an epoch
runs/NAME/manifest.json                    command, seed, versions, hardware, minutes, peak memory
runs/NAME/report/                          curves; pictures with photographs in report/photos/
runs/NAME/state/step-N/                    what --resume goes on from
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from tqdm import tqdm

from cvlab import atomic, card, checkpoint, hub
from cvlab.data import PARTS, SHAPES, Parts, classification_parts, segmentation_parts
from cvlab.optim import OPTIMIZERS, SCHEDULES, fastest_precision


def parser(description: str, **defaults: object) -> argparse.ArgumentParser:
    """The options that every training script has; `defaults` are those of the script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, help="data folder; without one, synthetic scenes (cvlab/shapes.py)")
    group.add_argument("--split-seed", type=int, default=0, help="decides which pictures train, choose and test")
    group.add_argument("--image-size", type=int, help="side of the square that the network sees, pixels")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch-size", type=int)
    group.add_argument("--lr", type=float, help="(highest) learning rate")
    group.add_argument("--optimizer", choices=OPTIMIZERS)
    group.add_argument("--schedule", choices=SCHEDULES, default="onecycle")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--patience", type=int, default=50, help="stop after so many epochs without a better val score")
    group.add_argument("--seed", type=int, default=0, help="weights, order and augmentation")
    group.add_argument("--start-from", type=Path, metavar="CHECKPOINT", help="begin with the weights of this model")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the faster here")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path("runs") / Path(sys.argv[0]).stem, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on from the last saved epoch of --out")
    group.add_argument("--push", metavar="USER/NAME", help="publish the trained model on the Hugging Face Hub")
    parser.set_defaults(**defaults)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs a script; what a person can put right ends in a sentence. CVLAB_TRACEBACK=1 shows where it came from."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The best model so far is in the run folder; the same command with --resume goes on.")
    except (ValueError, OSError) as error:
        if os.environ.get("CVLAB_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}")


def open_run(args: argparse.Namespace) -> Path | None:
    """Makes the run folder, and returns the saved state to go on from: None to start at the beginning."""
    states = sorted((args.out / "state").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if args.resume:
        return states[-1] if states else None
    if states:
        raise ValueError(f"{args.out} holds a run already: go on with --resume, or choose another --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "history.jsonl").unlink(missing_ok=True)
    return None


def start_from(folder: Path, model: nn.Module) -> None:
    """Gives a fresh model the weights of a trained one of the same network.

    Raises:
        ValueError: the other's tensors are of other names or shapes.
    """
    try:
        model.load_state_dict(checkpoint.load(folder).state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"--start-from {folder}: it is another network than the one asked for. {reason}") from error


def describe(parts: Parts, part_lengths: dict[str, int]) -> None:
    """Prints what the data is and what was done to it."""
    lengths = ", ".join(f"{part} {length}" for part, length in part_lengths.items())
    print(f"{parts.name}: {len(parts.class_names)} classes ({', '.join(parts.class_names[:8])}), pictures: {lengths}")
    for note in parts.notes[:20]:
        print("  " + note)
    if len(parts.notes) > 20:
        print(f"  ... and {len(parts.notes) - 20} more.")


def accelerator_for(
    args: argparse.Namespace, model: nn.Module, images: Tensor, criterion: Callable[[Tensor], Tensor]
) -> Accelerator:
    """The Accelerator of a run; its precision is measured where --precision is auto, and kept when resumed."""
    recorded = args.out / "state" / "precision.txt"
    if args.precision == "auto" and args.resume and recorded.is_file():
        args.precision = recorded.read_text().strip()
    elif args.precision == "auto":
        args.precision = fastest_precision(model, images, criterion)
    atomic.write_text(recorded, args.precision + "\n")
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=args.seed)
    return Accelerator(mixed_precision="no" if args.precision == "fp32" else "bf16", dataloader_config=loading)


def parts_of(model: nn.Module, data: Path | None, part: str) -> tuple[Parts, int]:
    """The parts that a trained model knows, and how many of the pictures it was trained on.

    Args:
        data: the data folder; None for a model of synthetic scenes.
        part: the one that is needed, or "all": then samples["all"] are those of all parts.

    Raises:
        ValueError: no folder was given, or its classes are not the model's.
    """
    facts, size = model.config.get("data", {}), model.image_size
    needed = () if part == "all" else (part,)
    if data is None and facts.get("name") != SHAPES:
        raise ValueError(f"The model was trained on {facts.get('name')}: give its folder with --data.")
    if model.task == "classification":
        parts = classification_parts(data, facts.get("split_seed", 0), facts.get("per_class"), size, True, needed)
    else:
        parts = segmentation_parts(data, facts.get("split_seed", 0), model.class_names, size, needed)
    if parts.class_names != model.class_names:
        raise ValueError(f"The classes of {data} are {parts.class_names}, the model's {model.class_names}.")
    trained_on = parts.as_recorded(facts.get("fingerprints", {}))
    parts.samples["all"] = [sample for name in PARTS for sample in parts.samples[name]]
    return parts, trained_on


def save_state(accelerator: Accelerator, out: Path, step: int, **progress: object) -> None:
    """Saves everything that --resume needs as out/state/step-N, whole or not at all, and drops older ones."""
    with atomic.new_folder(out / "state" / f"step-{step}") as folder:
        accelerator.save_state(str(folder))
        atomic.write_text(folder / "progress.json", json.dumps(progress))
    for path in (out / "state").glob("step-*"):
        if path.name != f"step-{step}":
            shutil.rmtree(path)


def load_state(accelerator: Accelerator, state: Path) -> dict:
    """Restores weights, optimizer, schedule and random numbers; returns the progress that was saved with them."""
    accelerator.load_state(str(state))
    return json.loads((state / "progress.json").read_text())


def read_history(out: Path, epochs: int) -> list[dict]:
    """The first lines of history.jsonl, one an epoch; what a killed run wrote beyond `epochs` is dropped."""
    path = out / "history.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    history = [json.loads(line) for line in lines[:epochs]]
    write_history(out, history)
    return history


def read_json(path: Path) -> dict:
    """The object in a file, {} where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_history(out: Path, history: list[dict]) -> None:
    """One JSON object a line."""
    atomic.write_text(out / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def print_epoch(line: dict, epochs: int, best: bool) -> None:
    """One aligned line an epoch; a star marks the best so far."""
    shown = {key: value for key, value in line.items() if key not in ("epoch", "lr", "seconds")}
    scores = "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items())
    star = "*" if best else " "
    tqdm.write(f"epoch {line['epoch']:>3}/{epochs}  {scores}  lr {line['lr']:.1e}  {line['seconds']:>6.1f} s {star}")


def write_manifest(args: argparse.Namespace, model: nn.Module, history: list[dict]) -> None:
    """manifest.json: what was run, on what, and how long it took."""
    packages = ("torch", "torchvision", "timm", "accelerate", "captum", "numpy", "pillow")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    before = read_json(args.start_from / "manifest.json") if args.start_from else {}
    manifest = {
        "command": shlex.join(["python", *sys.argv]),
        "started_from": {key: before.get(key) for key in ("command", "epochs", "minutes")} if before else None,
        "seed": args.seed,
        "split_seed": args.split_seed,
        "precision": args.precision,
        "commit": commit or None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "minutes": round(sum(line["seconds"] for line in history) / 60, 2),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    atomic.write_text(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def finish(args: argparse.Namespace) -> None:
    """Says what to do with the trained model, and publishes it where --push asks for that."""
    data = f" --data {shlex.quote(str(args.data))}" if args.data else ""
    print(f"Look at it:  python app.py {args.out}")
    print(f"Measure it:  python train/evaluate.py {args.out}{data} --part test")
    if args.push:
        card.write(args.out, args.push)
        print(f"Published:   {hub.push(args.out, args.push)}")


def hardware() -> str:
    """The processor that trains, with the number of cores or the name of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
