"""What is in a run folder: nothing that was made is lost, no damaged state is used, and one process trains there."""

import os
import platform
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import resume
import runs
from runs import here, history, kept, last, last_words, same, without_time

from cvlab.files import write_bytes

CONSTANT = ["--image-size", 32, "--precision", "fp32", "--widths", 8, 8, "--batch-size", 8, "--schedule", "constant"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Options of a small training: 2 steps an epoch."""
    folder = runs.colours(tmp_path_factory.mktemp("data") / "colours", 17)
    return ["--data", folder, *CONSTANT]


@pytest.fixture(scope="module")
def trained(words: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; to be copied."""
    out = tmp_path_factory.mktemp("trained") / "run"
    here("classifier", *words, "--epochs", 2, "--out", out)
    return out


@pytest.fixture(scope="module")
def whole(words: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one go with an epoch more."""
    out = tmp_path_factory.mktemp("whole") / "run"
    here("classifier", *words, "--epochs", 3, "--out", out)
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "flipped": flip,
}


def as_in_one_go(out: Path, whole: Path) -> bool:
    equal = same(last(out), last(whole)) and same(kept(out), kept(whole))
    return equal and without_time(out) == without_time(whole)


# --- damaged states ---------------------------------------------------------------------------------------------------


def test_the_two_newest_states_are_kept(trained: Path, whole: Path) -> None:
    assert [path.name for path in resume.saved_states(trained)] == ["step-2", "step-4"]
    assert [path.name for path in resume.saved_states(whole)] == ["step-4", "step-6"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_to_any_file_of_a_state_is_found(damage: str, out: Path, capsys: pytest.CaptureFixture) -> None:
    names = [path.name for path in (out / "state" / "step-4").iterdir()]
    assert len(names) >= 5
    for name in names:
        path = out / "state" / "step-4" / name
        before = path.read_bytes()
        DAMAGES[damage](path)
        assert resume.newest_whole(out).name == "step-2"
        printed = capsys.readouterr().out
        assert "step-4 is damaged" in printed
        assert name in printed  # sha256.json is named with any
        path.write_bytes(before)
    assert resume.newest_whole(out).name == "step-4"
    assert not capsys.readouterr().out


def test_a_training_continues_from_the_state_before_a_damaged_one(out: Path, whole: Path, words: list) -> None:
    flip(out / "state" / "step-4" / "optimizer.bin")
    here("classifier", *words, "--epochs", 3, "--out", out, "--resume")
    assert as_in_one_go(out, whole)
    assert [path.name for path in resume.saved_states(out)] == ["step-4", "step-6"]
    assert not any(resume.damaged_files(state) for state in resume.saved_states(out))


def test_what_lies_beside_a_state_disturbs_nothing(out: Path, whole: Path, words: list) -> None:
    """Nor does a history that is longer, shorter or no history."""
    for name in ("step-abc", "step-", "step-999", "step-²"):
        (out / "state" / name).mkdir()
    (out / "state" / "step-abc" / "file").write_text("mine")
    (out / "state" / "step-77").write_text("a file")
    (out / "state" / "precision.txt").write_text("bf16")
    (out / "state" / "step-4" / ".DS_Store").write_text("of a file manager")
    (out / "history.jsonl").write_text((whole / "history.jsonl").read_text() * 2 + '{"epoch":')
    here("classifier", *words, "--epochs", 3, "--out", out, "--resume")
    assert as_in_one_go(out, whole)
    assert (out / "state" / "step-abc" / "file").read_text() == "mine"
    (out / "history.jsonl").unlink()
    here("classifier", *words, "--epochs", 3, "--out", out, "--resume")  # nothing is left to be trained
    assert as_in_one_go(out, whole)


def test_where_all_states_are_damaged_nothing_is_trained_or_lost(out: Path, words: list) -> None:
    for step, damage in ((2, cut), (4, flip)):
        damage(out / "state" / f"step-{step}" / "model.safetensors")
    before = contents(out)
    said = last_words("classifier", *words, "--epochs", 3, "--out", out, "--resume")
    assert "damaged" in said
    assert "--overwrite" in said
    assert contents(out) == before


# --- nothing that was made is lost ------------------------------------------------------------------------------------


def test_a_command_that_fails_at_once_deletes_nothing(out: Path, words: list, tmp_path: Path) -> None:
    (out / "metrics.json").write_text("{}")
    (out / ".model.safetensors.0.tmp").write_text("of a killed run")
    before = contents(out)
    for option in ("--resume", "--overwrite", "--patience=1"):
        assert last_words("classifier", "--data", tmp_path / "nothing", *CONSTANT, "--epochs", 2, "--out", out, option)
        assert contents(out).items() >= before.items() - {(".model.safetensors.0.tmp", b"of a killed run")}
    reports = tmp_path / "reports"  # of train/evaluate.py --out
    reports.mkdir()
    (reports / "metrics.json").write_text("{}")
    assert "metrics.json" in last_words("classifier", *words, "--epochs", 1, "--out", reports)
    assert contents(reports) == {"metrics.json": b"{}"}


def test_the_old_model_stays_until_a_better_one_is_written(out: Path, words: list, tmp_path: Path) -> None:
    (out / "metrics.json").write_text("{}")
    before = contents(out)
    other = [*words, "--seed", 1, "--epochs", 2]
    with runs.ctrl_c_in_step(2), pytest.raises(KeyboardInterrupt):
        here("classifier", *other, "--out", out, "--overwrite")
    after = contents(out)
    assert [path.name for path in resume.saved_states(out)] == ["step-2"]
    assert {name: after.get(name) for name in before if "state" not in name} == {
        name: content for name, content in before.items() if "state" not in name
    }
    here("classifier", *other, "--out", out, "--resume")
    here("classifier", *other, "--out", tmp_path / "whole")
    assert as_in_one_go(out, tmp_path / "whole")
    assert not (out / "metrics.json").exists()


def test_a_training_that_goes_wrong_leaves_the_old_model(out: Path, words: list) -> None:
    """Its loss on val is not a number in any epoch."""
    (out / "metrics.json").write_text("{}")
    before = contents(out)
    wrong = [*words, "--batch-size", 500, "--lr", 1e30, "--epochs", 1]
    assert "val" in last_words("classifier", *wrong, "--out", out, "--overwrite")
    after = contents(out)
    assert [name for name in before if "state" not in name and after.get(name) != before[name]] == []


# --- one process trains in a folder -----------------------------------------------------------------------------------


@contextmanager
def another_process(out: Path) -> Iterator[int]:
    """A process that trains in a folder, as far as others can see."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resume.hold(out)
        os.write(writing, b"held")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 4)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("option", ["--resume", "--overwrite", "--patience=50"])
def test_a_second_process_is_told_who_trains_there(option: str, out: Path, words: list) -> None:
    with another_process(out) as process:
        before = contents(out)
        said = last_words("classifier", *words, "--epochs", 3, "--out", out, option)
        assert f"rocess {process} on {platform.node()}" in said
        assert time.strftime("%Y-%m-%d") in said
        assert "--out" in said
        assert contents(out) == before


def test_the_lock_of_a_killed_process_is_free(out: Path, whole: Path, words: list) -> None:
    with another_process(out):
        pass
    here("classifier", *words, "--epochs", 3, "--out", out, "--resume")
    assert as_in_one_go(out, whole)
    with another_process(out):  # a training that has ended has given it back
        pass


# --- the test part ----------------------------------------------------------------------------------------------------


def test_a_reading_of_the_test_part_that_fails_is_not_noted(out: Path, words: list, tmp_path: Path) -> None:
    assert "--calibrate" in last_words("evaluate", out, "--data", words[1], "--unknown", tmp_path)
    assert not (out / "test_reads.jsonl").exists()
    assert len(history(out)) == 2


# --- what the system refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "file"),
        ("file/below/it", "file"),
        ("a" * 300, "too long"),
        ("there/" + "a" * 300, "too long"),
        ("line\nend", "line end"),
        ("line\r", "line end"),
    ],
)
@pytest.mark.parametrize("script", ["classifier", "evaluate"])
def test_an_out_that_cannot_be_is_a_sentence_before_any_work(
    script: str, name: str, reason: str, trained: Path, words: list, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    command = [*words, "--epochs", 1] if script == "classifier" else [trained, "--data", tmp_path / "nothing"]
    said = last_words(script, *command, "--out", tmp_path / name)
    assert len(said.splitlines()) == 1
    assert str(tmp_path) in said
    assert reason in said
    assert "--out" in said
    assert "Errno" not in said
    assert "Error:" not in said
    assert contents(tmp_path) == {"file": b"mine"}


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_leaves_the_last_whole_state(words: list, tmp_path: Path) -> None:
    """The state of the optimizer is more than 350 kB, the pictures and the model are less."""
    out = tmp_path / "run"
    large = [*words, "--widths", 24, 48, "--optimizer", "adam", "--out", out, "--epochs"]
    here("classifier", *large, 1)
    before = contents(out / "state")
    for step in (1, 100):  # stopped in mid-epoch; at the end of the epoch
        with no_file_beyond(350_000), runs.ctrl_c_in_step(step):
            said = last_words("classifier", *large, 2, "--resume")
        assert str(out / "state") in said
        assert re.search(r"needs 0\.[5-9]\d? MB", said)
        assert "--resume" in said
        assert contents(out / "state") == before
    with no_file_beyond(50_000):
        assert re.search(r"decoded pictures .* MB", last_words("classifier", *large, 2, "--resume"))
    with no_file_beyond(0):
        said = last_words("classifier", *large, 2, "--resume")
        assert "Make room" in said
        assert "Error" not in said
    here("classifier", *large, 2, "--resume")
    assert len(history(out)) == 2


def test_a_file_that_does_not_fit_is_named_with_its_size(tmp_path: Path) -> None:
    with no_file_beyond(1000), pytest.raises(OSError, match=r"2\.00 MB") as error:
        write_bytes(tmp_path / "model", bytes(2_000_000))
    assert error.value.filename == str(tmp_path / "model")
    assert not list(tmp_path.iterdir())
