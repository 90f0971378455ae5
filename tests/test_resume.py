"""Trainings that are ended at any moment, run in several processes, or go wrong: nothing is lost, nothing differs."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from runs import SMALL_CLASSIFIER, SMALL_SEGMENTER, here, history, kept, last, last_words, read, same, without_time

from cvlab import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    photos = runs.colours(root / "colours")
    return {"classifier": photos, "transfer": photos, "segmenter": runs.discs(root / "discs")}


def command(*words: object, limit: Callable[[], None] | None = None) -> str:
    """What a Python command of the repository's root printed, errors included."""
    answer = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=runs.ROOT, capture_output=True, text=True, timeout=400, check=False, preexec_fn=limit,
    )  # fmt: skip
    return answer.stdout + answer.stderr


MIXED = [*SMALL_CLASSIFIER, "--dropout", 0.2, "--mixup", 0.2, "--batch-size", 4]
PHASES = ["--backbone", "test_resnet", "--no-pretrained", "--epochs", 1, "--unfreeze", 1, "--finetune-epochs", 2]


@pytest.mark.parametrize(
    ("script", "words", "step"),  # of 11 in an epoch of the classifiers, 7 of the segmenter
    [
        ("classifier", [*MIXED, "--cutmix", 1, "--ema", 0.9, "--clip-norm", 1], 15),
        ("segmenter", [*SMALL_SEGMENTER, "--dropout", 0.2, "--batch-size", 4], 9),
        ("transfer", [*SMALL_CLASSIFIER[:2], *MIXED[-2:], *PHASES, "--precision", "fp32"], 5),
        ("transfer", [*SMALL_CLASSIFIER[:2], *MIXED[-2:], *PHASES, "--precision", "fp32", "--views", 2], 16),
    ],
)
def test_ctrl_c_in_the_middle_of_an_epoch(script: str, words: list, step: int, data: dict, tmp_path: Path) -> None:
    """The step is finished and saved, and --resume ends with the same bits as a training in one go."""
    if script == "transfer":
        words = [*words, "--head", "map", "--channels", 4, "--dropout", 0.5]
    words = ["--data", data[script], *words]
    here(script, *words, "--out", tmp_path / "whole")
    with runs.ctrl_c_in_step(step), pytest.raises(KeyboardInterrupt):
        here(script, *words, "--out", tmp_path / "run")
    assert runs.state(tmp_path / "run").name == f"step-{step}"
    assert read(runs.state(tmp_path / "run") / "progress.json")["step"] > 0
    here(script, *words, "--out", tmp_path / "run", "--resume")
    assert same(last(tmp_path / "run"), last(tmp_path / "whole"))
    assert same(kept(tmp_path / "run"), kept(tmp_path / "whole"))
    assert without_time(tmp_path / "run") == without_time(tmp_path / "whole")


def test_a_run_ended_at_random_moments_ends_with_the_same_bits(data: dict, tmp_path: Path) -> None:
    """SIGKILL: from the last whole epoch. SIGTERM: from that step. In turn.."""
    words = ["--data", data["classifier"], *MIXED, "--epochs", 6, "--out", tmp_path / "run"]
    printed = command("tests/interrupt.py", "SIGKILL,SIGTERM", 8, "classifier", *words)
    assert "at last: 0" in printed
    assert "ended early: 0" not in printed
    assert same(last(tmp_path / "run"), last(tmp_path / "run-whole"))
    assert same(kept(tmp_path / "run"), kept(tmp_path / "run-whole"))
    assert without_time(tmp_path / "run") == without_time(tmp_path / "run-whole")
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_two_processes_learn_as_one(data: dict, tmp_path: Path) -> None:
    """Without BatchNorm and dropout the same losses, and every val picture (6, in batches of 4) counted once."""
    words = ["--data", data["segmenter"], *SMALL_SEGMENTER, "--batch-size", 4, "--no-batch-norm", "--loss", "bce"]
    here("segmenter", *words, "--out", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    printed = command(*torchrun, "train/segmenter.py", *words, "--out", tmp_path / "two")
    one, two = without_time(tmp_path / "one"), without_time(tmp_path / "two")
    assert len(two) == 3, printed
    assert (runs.state(tmp_path / "two") / "random_states_1.pkl").is_file()  # of the second process
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert printed.count("epoch   3/3") == 1  # one process speaks
    assert checkpoint.load(tmp_path / "two").class_names == ["foreground"]


def test_a_loss_that_is_not_a_number_ends_in_a_sentence_before_anything_is_saved(data: dict, tmp_path: Path) -> None:
    words = ["--data", data["classifier"], *SMALL_CLASSIFIER, "--lr", 1e20, "--out", tmp_path / "run"]
    assert "--lr" in last_words("classifier", *words)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with runs.ctrl_c_in_step(2):  # nor is it saved when the training is stopped
        assert "--lr" in last_words("classifier", *words)
    assert not list((tmp_path / "run" / "state").glob("step-*"))


def test_a_full_disk_leaves_the_best_model_whole(data: dict, tmp_path: Path) -> None:
    """No file may grow beyond 30 kB: the model (20 kB) fits, the optimizer's state (40 kB) does not."""

    def no_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    words = ["--data", data["classifier"], *SMALL_CLASSIFIER, "--optimizer", "adam", "--out", tmp_path / "run"]
    printed = command("train/classifier.py", *words, limit=no_more)
    assert "Traceback" not in printed
    assert "Error:" in printed
    assert checkpoint.load(tmp_path / "run").class_names == ["blue", "red"]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size == 0]
    assert read(tmp_path / "run" / "config.json")["cvlab"]["network"] == "convnet"


def test_a_folder_that_holds_a_model_is_not_overwritten_unasked(data: dict, tmp_path: Path) -> None:
    words = ["--data", data["classifier"], *SMALL_CLASSIFIER, "--epochs", 1, "--out", tmp_path / "run"]
    here("classifier", *words)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    other = [*words, "--seed", 1]
    assert "--overwrite" in last_words("classifier", *other)
    for path in (tmp_path / "run" / "state").iterdir():  # as a model that was shipped or fetched
        path.unlink() if path.is_file() else shutil.rmtree(path)
    (tmp_path / "run" / "state").rmdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    (tmp_path / "run" / "mine.txt").write_text("not of the run")
    assert "--overwrite" in last_words("classifier", *other)
    assert "state" in last_words("classifier", *other, "--resume")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    here("classifier", *other, "--overwrite")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    assert len(history(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "metrics.json").exists()  # scores of the model that is gone
    assert (tmp_path / "run" / "mine.txt").exists()
