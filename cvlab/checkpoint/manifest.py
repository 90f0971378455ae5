"""manifest.json of a run: what was run, on what hardware, how long it took, and which epoch was kept."""

import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from cvlab.files import read_json, to_json, write_text
from cvlab.models import Model

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "captum", "numpy", "pillow")


def write(folder: Path, options: dict, model: Model, history: Sequence[dict], best_epoch: int, precision: str) -> None:
    """Writes manifest.json of a training with these options, whose history.jsonl has these lines."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root, check=False)
    start = options["start_from"]
    before = read_json(start / "manifest.json") if start else {}
    manifest = {
        "command": shlex.join(["python", *sys.argv]),
        "recipe": options["recipe"],
        "started_from": {key: before.get(key) for key in ("command", "epochs", "minutes")} if before else None,
        "seed": options["seed"],
        "split_seed": options["split_seed"],
        "precision": precision,
        "commit": commit.stdout.strip() or None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "best_epoch": best_epoch,
        "best_by": options.get("best_by", "iou"),
        "minutes": round(sum(line["seconds"] for line in history) / 60, 2),
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(folder / "manifest.json", to_json(manifest, indent=1) + "\n")


def peak_memory_mb() -> int:
    """The most memory that this process has used so far, in MiB; with a GPU, the most of the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def hardware() -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
