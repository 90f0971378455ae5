"""Small trainings for tests: folders of pictures, scripts as processes or in this process, and what a run left."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train"
RECIPES = sorted((TRAIN / "recipes").glob("*.toml"))
if str(TRAIN) not in sys.path:
    sys.path.insert(0, str(TRAIN))

SMALL = ["--image-size", 32, "--epochs", 3, "--precision", "fp32"]
SMALL_CLASSIFIER = [*SMALL, "--widths", 8, 16, "--batch-size", 16, "--lr", 0.05]
SMALL_SEGMENTER = [*SMALL, "--width", 4, "--depth", 2, "--batch-size", 8]


# --- folders of pictures ----------------------------------------------------------------------------------------------


def colours(folder: Path, each: int = 30) -> Path:
    """Pictures of two classes that a small network can tell apart: mostly red, mostly blue."""
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def discs(folder: Path, count: int = 40) -> Path:
    """Pictures with a bright disc, and its mask."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        centre_x, centre_y, radius = rng.uniform(12, 36), rng.uniform(12, 28), rng.uniform(6, 11)
        mask = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        pixels = rng.integers(0, 100, (40, 48, 3)) + 130 * mask[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    return folder


def noise(folder: Path, classes: str = "abc", each: int = 8) -> Path:
    """Pictures of noise, `each` of every class: there is nothing to learn, and nothing to decode for long."""
    rng = np.random.default_rng(0)
    for path in (folder / name / f"{i}.png" for name in classes for i in range(each)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 56, 3), dtype=np.uint8)).save(path)
    return folder


# --- scripts ----------------------------------------------------------------------------------------------------------


def as_process(script: str, *words: object, check: bool = True, **settings: object) -> subprocess.CompletedProcess:
    """train/SCRIPT.py as a command."""
    command = [sys.executable, f"train/{script}.py", *map(str, words)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False, **settings)
    assert answer.returncode == 0 or not check, answer.stderr[-2000:]
    return answer


def module_of(script: str) -> ModuleType:
    """train/SCRIPT.py, imported once; a benchmark of the same name may have come first."""
    if Path(importlib.import_module(script).__file__).parent != TRAIN:
        del sys.modules[script]
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(TRAIN)
            importlib.import_module(script)
    return sys.modules[script]


def here(script: str, *words: object) -> None:
    """train/SCRIPT.py in this process: importing torch takes longer than a small training. Errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"train/{script}.py", *map(str, words)])
        try:
            module_of(script).main()
        finally:
            importlib.import_module("resume").release()  # as when a process ends


def last_words(script: str, *words: object) -> str:
    """The sentence in which train/SCRIPT.py ends because of an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"train/{script}.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            importlib.import_module("cli").run(module_of(script).main)
    importlib.import_module("resume").release()
    return str(end.value)


@contextmanager
def ctrl_c_in_step(number: int) -> Iterator[None]:
    """Ctrl-C in this process while the so many-th step of an optimizer is done."""
    steps = iter(range(1, 10**9))

    def hook(*_: object) -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGINT)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- what a run left --------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def history(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def without_time(out: Path) -> list[dict]:
    return [{**line, "seconds": 0} for line in history(out)]


def kept(out: Path) -> dict[str, Tensor]:
    """The weights of the best epoch."""
    return load_file(out / "model.safetensors")


def state(out: Path) -> Path:
    """The newest saved state."""
    return importlib.import_module("resume").saved_states(out)[-1]


def last(out: Path) -> dict[str, Tensor]:
    """The weights of the last step."""
    return load_file(state(out) / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(tensor.equal(second[name]) for name, tensor in first.items())
