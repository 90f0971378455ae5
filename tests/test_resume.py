"""Trainings that are ended at any moment, run in several processes, or go wrong: nothing is lost, nothing differs."""

import ctypes
import json
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
    """No file may grow beyond 350 kB: photos (334 kB) and model (180 kB) fit, the state of the optimizer does not."""

    def no_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, 350_000))

    words = ["--data", data["classifier"], *SMALL_CLASSIFIER, "--widths", 24, 48, "--optimizer", "adam"]
    printed = command("train/classifier.py", *words, "--out", tmp_path / "run", limit=no_more)
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


@pytest.fixture(scope="module")
def begun(data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of one epoch, with a schedule that does not depend on their number."""
    out = tmp_path_factory.mktemp("begun") / "run"
    here("classifier", *CONSTANT, "--data", data["classifier"], "--out", out)
    return out


CONSTANT = [*SMALL_CLASSIFIER, "--schedule", "constant", "--epochs", 1]


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["--lr", 0.01], "0.05", "0.01"),
        (["--batch-size", 8], "16", "8"),
        (["--schedule", "onecycle", "--epochs", 3], "constant", "onecycle"),
        (["--widths", 8, 8], "[8, 16]", "[8, 8]"),
        (["--seed", 1], "0", "1"),
        (["--class-weights", "balanced"], "none", "balanced"),
        (["--augment", "none"], "full", "none"),
    ],
)
def test_resume_refuses_other_options_with_their_old_and_new_values(
    words: list, old: str, new: str, begun: Path, data: dict
) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    said = last_words("classifier", *CONSTANT, *words, "--data", data["classifier"], "--out", begun, "--resume")
    assert f"{words[0].replace('no-', '')} was {old} and is {new}" in said
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_resume_refuses_other_pictures_and_other_classes(begun: Path, data: dict, tmp_path: Path) -> None:
    shutil.copytree(data["classifier"], tmp_path / "renamed")
    shutil.copytree(begun, tmp_path / "run")
    words = [*CONSTANT, "--out", tmp_path / "run", "--resume", "--data"]
    here("classifier", *words, tmp_path / "renamed", "--epochs", 2)  # the same pictures in another place: more epochs
    assert [line["epoch"] for line in history(tmp_path / "run")] == [1, 2]
    shutil.copy(runs.noise(tmp_path / "noise", "a", 1) / "a" / "0.png", tmp_path / "renamed" / "red" / "new.png")
    said = last_words("classifier", *words, tmp_path / "renamed", "--epochs", 3)
    assert "train 44, val 8, test 8" in said
    assert "train 43, val 9, test 9" in said
    (tmp_path / "renamed" / "red").rename(tmp_path / "renamed" / "green")
    said = last_words("classifier", *words, tmp_path / "renamed", "--epochs", 3)
    assert "blue, red" in said
    assert "blue, green" in said
    assert len(history(tmp_path / "run")) == 2


def test_a_run_records_its_options(begun: Path) -> None:
    recorded = checkpoint.load(begun).config["options"]
    assert (recorded["lr"], recorded["widths"], recorded["epochs"]) == (0.05, [8, 16], 1)
    assert not {"out", "data", "resume", "push"} & recorded.keys()  # nothing of the owner's disk is published


def test_a_schedule_that_plans_every_step_takes_no_more_epochs(data: dict, tmp_path: Path) -> None:
    """onecycle and cosine; and a phase that is over. The phase that has not begun may become longer or shorter."""
    words = ["--data", data["transfer"], "--image-size", 32, "--batch-size", 16, "--out", tmp_path / "run"]
    words += ["--backbone", "test_resnet", "--no-pretrained", "--precision", "fp32", "--unfreeze", 1]
    with runs.ctrl_c_in_step(1), pytest.raises(KeyboardInterrupt):
        here("transfer", *words, "--epochs", 1, "--finetune-epochs", 1)
    resumed = [*words, "--resume", "--finetune-schedule", "cosine"]
    assert "--epochs was 1 and is 2; cosine" in last_words("transfer", *resumed, "--epochs", 2, "--finetune-epochs", 1)
    here("transfer", *resumed, "--epochs", 1, "--finetune-epochs", 2)
    assert len(history(tmp_path / "run")) == 3
    for epochs in ((2, 2), (1, 3), (1, 1)):
        assert "was" in last_words("transfer", *resumed, "--epochs", epochs[0], "--finetune-epochs", epochs[1])
    assert len(history(tmp_path / "run")) == 3


def test_a_nan_in_val_is_no_best_and_no_bare_nan_in_a_file(data: dict, tmp_path: Path) -> None:
    """One step an epoch: its loss is that of the first weights, and the step makes the weights useless."""
    words = [*CONSTANT, "--data", data["classifier"], "--batch-size", 500, "--lr", 1e30, "--out", tmp_path / "run"]
    assert "val" in last_words("classifier", *words)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    (line,) = history(tmp_path / "run")
    assert line["val_loss"] is None
    files = [*(tmp_path / "run").rglob("*.json"), tmp_path / "run" / "history.jsonl"]
    assert len(files) >= 3
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in a file"))
    assert read(runs.state(tmp_path / "run") / "progress.json")["best_epoch"] == 0


def test_a_folder_that_cannot_be_written_is_a_sentence(begun: Path, data: dict, tmp_path: Path) -> None:
    """The tests may run as root, who is asked for no permission unless this capability is dropped."""

    def without_power() -> None:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE

    shutil.copytree(begun, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "model"):
        folder.chmod(0o555)
    code = f"""import sys
sys.path.append("tests")
from runs import last_words
print("said:", last_words("evaluate", {str(tmp_path / "model")!r}, "--data", {str(data["classifier"])!r}))
print("said:", last_words("classifier", "--out", {str(tmp_path / "empty")!r}))"""
    said = [line for line in command("-c", code, limit=without_power).splitlines() if line.startswith("said:")]
    assert len(said) == 2
    assert str(tmp_path / "model") in said[0]
    assert str(tmp_path / "empty") in said[1]
    assert all("--out" in line for line in said)
    assert not list((tmp_path / "empty").iterdir())
