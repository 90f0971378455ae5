"""--track: what a training gives to tensorboard and trackio, read with their own readers."""

import sys
from pathlib import Path

import pytest
import runs
from PIL import Image
from runs import SMALL_CLASSIFIER, SMALL_SEGMENTER, here, history, last_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCORES = ("train_loss", "val_loss", "val_accuracy", "lr")


@pytest.fixture(scope="module")
def folder_of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.colours(tmp_path_factory.mktemp("data") / "colours")


def test_tensorboard_has_every_epoch_once_also_of_a_resumed_run(folder_of_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    words = ["--data", folder_of_classes, "--out", out, *SMALL_CLASSIFIER, "--schedule", "constant"]
    words += ["--track", "tensorboard"]
    here("classifier", *words, "--epochs", 1)
    for more in (["--epochs", 2, "--resume"], ["--epochs", 1, "--overwrite"]):
        here("classifier", *words, *more)
        seen, lines = EventAccumulator(str(out / "tensorboard"), {"images": 0}).Reload(), history(out)
        for name in SCORES:
            found = [(event.step, event.value) for event in seen.Scalars(name)]
            assert found == [(line["epoch"], pytest.approx(line[name], abs=1e-6)) for line in lines]
        drawn = Image.open(out / "report/photos/epochs/epoch-001.png").size
        pictures = [(each.step, each.width, each.height) for each in seen.Images("picture")]
        assert pictures == [(line["epoch"], *drawn) for line in lines]


def test_trackio_keeps_a_run_under_the_project_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the runs of a sweep are in the folder of the sweep. Nothing but this machine is asked."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))  # read when trackio is imported
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    reached = []
    monkeypatch.setattr("socket.socket.connect", lambda connection, address: reached.append(address))
    data, out = runs.discs(tmp_path / "discs", 20), tmp_path / "sweep" / "003"
    words = ["--data", data, "--out", out, *SMALL_SEGMENTER, "--schedule", "constant", "--track", "trackio"]
    here("segmenter", *words, "--epochs", 1)
    trackio.finish()  # as when the process ends
    here("segmenter", *words, "--epochs", 2, "--resume")
    trackio.finish()
    assert not reached
    (run,) = trackio.Api().runs("sweep")
    assert (run.name, run.config["batch_size"], run.config["data"]) == ("003", 8, str(data))
    logged = SQLiteStorage.get_logs("sweep", "003")
    scores = [(line["step"], line["val_iou"]) for line in logged if "val_iou" in line]
    assert scores == [(line["epoch"], pytest.approx(line["val_iou"])) for line in history(out)]
    files = [tmp_path / "tracked" / "media" / line["picture"]["file_path"] for line in logged if "picture" in line]
    drawn = sorted((out / "report/photos/epochs").iterdir())
    assert [Image.open(file).size for file in files] == [Image.open(path).size for path in drawn]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    data = runs.noise(tmp_path / "noise")
    assert "pip install trackio" in last_words(
        "classifier", "--data", data, "--out", tmp_path / "r", "--track", "trackio"
    )
