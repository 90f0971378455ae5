"""The training scripts, run as commands on small data: what they leave, that they learn, that they resume exactly."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.data.duplicates import fingerprint
from cvlab.transforms import open_image, resize_logits, view

ROOT = Path(__file__).resolve().parents[1]
SMALL_CLASSIFIER = [
    "--image-size",
    "32",
    "--widths",
    "8",
    "16",
    "--batch-size",
    "16",
    "--epochs",
    "3",
    "--lr",
    "0.05",
    "--precision",
    "fp32",
]
SMALL_SEGMENTER = [
    "--image-size",
    "32",
    "--width",
    "4",
    "--depth",
    "2",
    "--batch-size",
    "8",
    "--epochs",
    "3",
    "--precision",
    "fp32",
]


def run(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, f"train/{script}.py", *map(str, arguments)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0 or not check, answer.stderr[-2000:]
    return answer


@pytest.fixture(scope="module")
def folder_of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of two classes that a small network can tell apart: mostly red, mostly blue."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder_of_masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures with a bright disc, and its mask."""
    folder = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for i in range(40):
        centre_x, centre_y, radius = rng.uniform(12, 36), rng.uniform(12, 28), rng.uniform(6, 11)
        mask = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        pixels = rng.integers(0, 100, (40, 48, 3)) + 130 * mask[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def classifier(folder_of_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "classifier"
    run("classifier", "--data", folder_of_classes, "--out", out, *SMALL_CLASSIFIER)
    return out


@pytest.fixture(scope="module")
def segmenter(folder_of_masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "segmenter"
    longer = ["--batch-size", 4, "--epochs", 10, "--lr", 0.01]
    run("segmenter", "--data", folder_of_masks, "--class-names", "disc", "--out", out, *SMALL_SEGMENTER, *longer)
    return out


def history(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_the_classifier_learns_and_leaves_a_whole_run(classifier: Path, folder_of_classes: Path) -> None:
    lines = history(classifier)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    keys = ["epoch", "lr", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "seconds"]
    assert list(lines[0]) == keys
    model = checkpoint.load(classifier)
    assert model.class_names == ["blue", "red"]
    for name in model.class_names:
        photo = open_image(next((folder_of_classes / name).iterdir()))
        assert model.class_names[model(view(photo, model)).argmax()] == name
    assert (classifier / "report" / "curves.png").is_file()
    manifest = json.loads((classifier / "manifest.json").read_text())
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    prints = model.config["data"]["fingerprints"]
    assert {part: len(each) for part, each in prints.items()} == {"train": 44, "val": 8, "test": 8}


def test_the_segmenter_learns_and_draws_an_example_every_epoch(segmenter: Path) -> None:
    lines = history(segmenter)
    assert max(line["val_iou"] for line in lines) > 0.7
    photos = segmenter / "report" / "photos"
    drawn = sorted(path.name for path in (photos / "epochs").iterdir())
    assert drawn == [f"epoch-{epoch:03}.png" for epoch in range(1, 11)]
    assert Image.open(photos / "attribution.webp").n_frames == 10
    assert checkpoint.load(segmenter).class_names == ["disc"]


@pytest.mark.parametrize(("script", "options"), [("classifier", SMALL_CLASSIFIER), ("segmenter", SMALL_SEGMENTER)])
def test_the_same_command_twice_and_resumed_gives_the_same_bits(
    script: str, options: list[str], folder_of_classes: Path, folder_of_masks: Path, tmp_path: Path
) -> None:
    """A run that stops after one epoch and is resumed ends where the run in one go ends.

    The schedule is constant here, as its length would follow --epochs.
    """
    data = folder_of_classes if script == "classifier" else folder_of_masks
    arguments = ["--data", data, *options, "--schedule", "constant", "--dropout", 0.2]
    for name in ("whole", "again"):
        run(script, *arguments, "--out", tmp_path / name)
    run(script, *arguments, "--out", tmp_path / "stopped", "--epochs", 1)
    run(script, *arguments, "--out", tmp_path / "stopped", "--epochs", 3, "--resume")

    def last_state(name: str) -> dict:
        (state,) = (tmp_path / name / "state").glob("step-*")
        return load_file(state / "model.safetensors")

    whole = last_state("whole")
    for name in ("again", "stopped"):
        other = last_state(name)
        assert all(tensor.equal(other[key]) for key, tensor in whole.items()), name
        without_time = [[{**line, "seconds": 0} for line in history(tmp_path / each)] for each in ("whole", name)]
        assert without_time[0] == without_time[1]


def test_the_best_epoch_is_kept(classifier: Path) -> None:
    """val accuracy of the saved model, counted anew, is the best of the history."""
    run("evaluate", classifier, "--data", data_of(classifier), "--part", "val", "--out", classifier / "again")
    metrics = json.loads((classifier / "again" / "metrics.json").read_text())
    assert metrics["accuracy"]["value"] == max(line["val_accuracy"] for line in history(classifier))


def data_of(out: Path) -> str:
    """The --data of the command that made a run."""
    words = json.loads((out / "manifest.json").read_text())["command"].split()
    return words[words.index("--data") + 1]


def test_a_patience_of_one_stops_early(folder_of_classes: Path, tmp_path: Path) -> None:
    """At a rate of zero nothing improves after the first epoch."""
    arguments = ["--lr", 0, "--epochs", 9, "--patience", 1, "--out", tmp_path / "run"]
    run("classifier", "--data", folder_of_classes, *SMALL_CLASSIFIER, *arguments)
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize("loss", ["bce", "dice", "focal", "bce+dice"])
def test_every_loss_of_the_segmenter_trains(folder_of_masks: Path, tmp_path: Path, loss: str) -> None:
    run("segmenter", "--data", folder_of_masks, "--out", tmp_path, *SMALL_SEGMENTER, "--loss", loss, "--epochs", 2)
    first, last = history(tmp_path)
    assert last["train_loss"] < first["train_loss"]


def test_options_of_the_classifier_that_change_the_loop(folder_of_classes: Path, tmp_path: Path) -> None:
    run(
        "classifier", "--data", folder_of_classes, "--out", tmp_path / "run", *SMALL_CLASSIFIER,
        *["--mixup", "0.3", "--cutmix", "1", "--batch-size", "500", "--optimizer", "adamw"],
        *["--precision", "bf16", "--per-class", "20", "5", "--epochs", "1"],
    )  # fmt: skip
    data = checkpoint.load(tmp_path / "run").config["data"]
    assert {part: len(each) for part, each in data["fingerprints"].items()} == {"train": 40, "val": 10, "test": 10}


def test_evaluation_of_a_classifier_counts_the_test_part_once(classifier: Path) -> None:
    run("evaluate", classifier, "--data", data_of(classifier))
    metrics = json.loads((classifier / "metrics.json").read_text())
    assert metrics["part"] == "test"
    assert metrics["n"] == 8
    assert metrics["accuracy"]["low"] <= metrics["accuracy"]["value"] <= metrics["accuracy"]["high"]
    assert len((classifier / "test_reads.jsonl").read_text().splitlines()) == 1
    report = (classifier / "report" / "README.md").read_text()
    for picture in ("confusion_matrix.png", "reliability.png", "photos/grad_cam.png"):
        assert picture in report
        assert Image.open(classifier / "report" / picture).width > 100


def test_evaluation_of_a_segmenter_equals_a_count_by_hand(segmenter: Path) -> None:
    """All pixels of the test part at the photos' own resolution, counted one image at a time in NumPy."""
    data = Path(data_of(segmenter))
    run("evaluate", segmenter, "--data", data, "--compare", segmenter)
    metrics = json.loads((segmenter / "metrics.json").read_text())
    model = checkpoint.load(segmenter)
    wanted = set(model.config["data"]["fingerprints"]["test"])
    paths = [path for path in sorted((data / "images").iterdir()) if fingerprint(path) in wanted]
    tp = fp = fn = 0
    for path in paths:
        logits = model(view(open_image(path), model)).detach()
        predicted = (resize_logits(logits, (40, 48))[0, 0].sigmoid() > 0.5).numpy()
        mask = np.asarray(Image.open(data / "masks" / path.name)) > 0
        tp, fp, fn = tp + (predicted & mask).sum(), fp + (predicted & ~mask).sum(), fn + (~predicted & mask).sum()
    assert metrics["n"] == len(paths) == 6
    assert metrics["iou"]["value"] == pytest.approx(tp / (tp + fp + fn), abs=1e-9)
    assert metrics["compared"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert Image.open(segmenter / "report" / "photos" / "stages.png").width > 300


def test_the_test_part_is_recognised_by_what_is_in_the_pictures(
    classifier: Path, folder_of_classes: Path, tmp_path: Path
) -> None:
    """Under other names the cut would be another; the parts are those that the training recorded."""
    for name in ("red", "blue"):
        (tmp_path / "renamed" / name).mkdir(parents=True)
        for i, path in enumerate(sorted((folder_of_classes / name).iterdir())):
            (tmp_path / "renamed" / name / f"photo-{29 - i}.png").write_bytes(path.read_bytes())
    scores = []
    for data in (folder_of_classes, tmp_path / "renamed"):
        run("evaluate", classifier, "--data", data, "--out", tmp_path / "report")
        metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
        scores.append((metrics["n"], metrics["accuracy"], metrics["expected_calibration_error"]))
    assert scores[0] == scores[1]
    run("evaluate", classifier, "--data", tmp_path / "renamed", "--part", "all", "--out", tmp_path / "report")
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["n"] == 60
    assert "44 of these pictures were trained on" in (tmp_path / "report" / "report" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["classifier", "--data", "no/such/folder"], "no/such/folder"),
        (["segmenter", "--data", "tests"], "tests"),
        (["evaluate", "no/such/model"], "no/such/model"),
        (["publish", "tests", "user/name"], "tests"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_it(arguments: list[str], named: str, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"] if arguments[0] in ("classifier", "segmenter") else []
    answer = run(*arguments, *out, check=False)
    assert answer.returncode != 0
    assert named in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_training_can_start_from_a_trained_model(segmenter: Path, tmp_path: Path) -> None:
    """At a rate of zero it scores from the first epoch what the other scored in the end, at a larger size too."""
    arguments = ["--data", data_of(segmenter), *SMALL_SEGMENTER, "--start-from", segmenter, "--epochs", 1]
    run("segmenter", *arguments, "--lr", 0, "--out", tmp_path / "same")
    (line,) = history(tmp_path / "same")
    best = max(each["val_iou"] for each in history(segmenter))
    assert line["val_iou"] == pytest.approx(best, abs=0.05)  # BatchNorm's statistics move on
    assert "started_from" in (tmp_path / "same" / "manifest.json").read_text()
    answer = run("segmenter", *arguments, "--width", 8, "--out", tmp_path / "other", check=False)
    assert answer.returncode != 0
    assert "another network" in answer.stderr


def test_a_second_run_does_not_overwrite_the_first(classifier: Path, folder_of_classes: Path) -> None:
    before = (classifier / "model.safetensors").read_bytes()
    answer = run("classifier", "--data", folder_of_classes, "--out", classifier, check=False)
    assert answer.returncode != 0
    assert (classifier / "model.safetensors").read_bytes() == before


def test_without_data_both_scripts_learn_synthetic_scenes(tmp_path: Path) -> None:
    """The shipped checkpoints were made by these commands without options: here one epoch, for the plumbing."""
    run("classifier", "--epochs", 1, "--out", tmp_path / "classifier", "--precision", "fp32", "--widths", 4, 8)
    run("segmenter", "--epochs", 1, "--out", tmp_path / "segmenter", "--precision", "fp32", "--width", 2)
    assert checkpoint.load(tmp_path / "classifier").class_names == shapes.CLASS_NAMES
    assert 0 < history(tmp_path / "segmenter")[0]["val_iou"] < 1
