"""Trainings that are ended at any moment, run in several processes, or go wrong: nothing is lost, nothing differs."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_train import SMALL_CLASSIFIER, SMALL_SEGMENTER, folder_of_classes, folder_of_masks, history

from cvlab import checkpoint

ROOT = Path(__file__).resolve().parents[1]
__all__ = ["folder_of_classes", "folder_of_masks"]  # fixtures


def command(*words: object, launcher: tuple[str, ...] = (), limit: Callable[[], None] | None = None) -> str:
    """What a command of the repository's root printed, errors included."""
    answer = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False, preexec_fn=limit,
    )  # fmt: skip
    return answer.stdout + answer.stderr


def last_state(out: Path) -> dict:
    (state,) = (out / "state").glob("step-*")
    return load_file(state / "model.safetensors")


def without_time(out: Path) -> list[dict]:
    return [{**line, "seconds": 0} for line in history(out)]


@pytest.mark.parametrize(
    ("signal", "times", "script"),
    [("SIGKILL", 20, "classifier"), ("SIGTERM", 6, "classifier"), ("SIGTERM", 3, "segmenter")],
)
def test_a_run_ended_at_random_moments_ends_with_the_same_bits(
    signal: str, times: int, script: str, folder_of_classes: Path, folder_of_masks: Path, tmp_path: Path
) -> None:
    """SIGKILL: from the last whole epoch. SIGTERM: from the very step, with dropout and mixing under way."""
    if script == "classifier":
        words = ["--data", folder_of_classes, *SMALL_CLASSIFIER, "--mixup", 0.2]
    else:
        words = ["--data", folder_of_masks, *SMALL_SEGMENTER]
    words += ["--dropout", 0.2, "--batch-size", 4, "--epochs", 8, "--out", tmp_path / "run"]
    printed = command("tests/interrupt.py", signal, times, script, *words)
    assert "at last: 0" in printed
    assert "ended early: 0" not in printed
    whole, resumed = last_state(tmp_path / "run-whole"), last_state(tmp_path / "run")
    assert all(tensor.equal(resumed[key]) for key, tensor in whole.items())
    assert without_time(tmp_path / "run") == without_time(tmp_path / "run-whole")
    best, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "run-whole"))
    assert all(tensor.equal(best[key]) for key, tensor in expected.items())
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_two_processes_learn_as_one(folder_of_masks: Path, tmp_path: Path) -> None:
    """Without BatchNorm and dropout the same losses, and every val picture (6, in batches of 4) counted once."""
    words = ["--data", folder_of_masks, *SMALL_SEGMENTER, "--batch-size", 4, "--no-batch-norm", "--loss", "bce"]
    command("train/segmenter.py", *words, "--out", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    printed = command("train/segmenter.py", *words, "--out", tmp_path / "two", launcher=torchrun)
    one, two = without_time(tmp_path / "one"), without_time(tmp_path / "two")
    assert len(two) == 3, printed
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert printed.count("epoch   3/3") == 1  # one process speaks
    assert checkpoint.load(tmp_path / "two").class_names == ["foreground"]


def test_a_loss_that_is_no_number_ends_in_a_sentence_before_the_weights_take_it_in(
    folder_of_classes: Path, tmp_path: Path
) -> None:
    words = ["--data", folder_of_classes, *SMALL_CLASSIFIER, "--lr", 1e20, "--out", tmp_path / "run"]
    printed = command("train/classifier.py", *words)
    assert "--lr" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_full_disk_leaves_the_best_model_whole(folder_of_classes: Path, tmp_path: Path) -> None:
    """No file may grow beyond 30 kB: the model (20 kB) fits, the optimizer's state (40 kB) does not."""

    def no_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    words = ["--data", folder_of_classes, *SMALL_CLASSIFIER, "--optimizer", "adam", "--out", tmp_path / "run"]
    printed = command("train/classifier.py", *words, limit=no_more)
    assert "Traceback" not in printed
    assert "Error:" in printed
    assert checkpoint.load(tmp_path / "run").class_names == ["blue", "red"]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size == 0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cvlab"]["network"] == "convnet"
