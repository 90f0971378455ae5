"""The training scripts, run as commands on small data: what they leave, that they learn, that they resume exactly."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image
from runs import SMALL_CLASSIFIER, SMALL_SEGMENTER, here, history, kept, last, last_words, read, same, without_time

from cvlab import checkpoint, plots
from cvlab.data import parts, shapes
from cvlab.data.duplicates import fingerprint
from cvlab.transforms import open_image, resize_logits, view


@pytest.fixture(scope="module")
def folder_of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def folder_of_masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.discs(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="module")
def classifier(folder_of_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "classifier"
    here("classifier", "--data", folder_of_classes, "--out", out, *SMALL_CLASSIFIER, "--schedule", "constant")
    return out


@pytest.fixture(scope="module")
def segmenter(folder_of_masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "segmenter"
    longer = ["--batch-size", 4, "--epochs", 10, "--lr", 0.01]
    here("segmenter", "--data", folder_of_masks, "--class-names", "disc", "--out", out, *SMALL_SEGMENTER, *longer)
    return out


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
    manifest = read(classifier / "manifest.json")
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    prints = model.config["data"]["fingerprints"]
    assert {part: len(each) for part, each in prints.items()} == {"train": 44, "val": 8, "test": 8}


def test_the_segmenter_learns_and_draws_an_example_every_epoch(segmenter: Path) -> None:
    lines = history(segmenter)
    assert max(line["val_iou"] for line in lines) > 0.7
    names = ("loss", "iou", "accuracy", "precision", "recall", "f1")
    assert {f"{part}_{name}" for part in ("train", "val") for name in names} == lines[0].keys() - {
        "epoch",
        "lr",
        "seconds",
    }
    photos = segmenter / "report" / "photos"
    drawn = sorted(path.name for path in (photos / "epochs").iterdir())
    assert drawn == [f"epoch-{epoch:03}.png" for epoch in range(1, 11)]
    assert checkpoint.load(segmenter).class_names == ["disc"]


@pytest.mark.parametrize("script", ["classifier", "segmenter"])
def test_the_same_command_and_a_resumed_one_give_the_same_bits(
    script: str, folder_of_classes: Path, folder_of_masks: Path, tmp_path: Path
) -> None:
    """A run that stops after one epoch and is resumed ends as a run in one go, and as the same command as a process.

    The schedule is constant here, as its length would follow --epochs.
    """
    data, options = (
        (folder_of_classes, SMALL_CLASSIFIER) if script == "classifier" else (folder_of_masks, SMALL_SEGMENTER)
    )
    words = ["--data", data, *options, "--schedule", "constant", "--dropout", 0.2]
    here(script, *words, "--out", tmp_path / "whole")
    runs.as_process(script, *words, "--out", tmp_path / "again")
    here(script, *words, "--out", tmp_path / "stopped", "--epochs", 1)
    here(script, *words, "--out", tmp_path / "stopped", "--resume")
    for name in ("again", "stopped"):
        assert same(last(tmp_path / name), last(tmp_path / "whole")), name
        assert without_time(tmp_path / name) == without_time(tmp_path / "whole")


def test_the_best_epoch_is_kept(classifier: Path) -> None:
    """val accuracy of the saved model, counted anew, is the best of the history."""
    here("evaluate", classifier, "--data", data_of(classifier), "--part", "val", "--out", classifier / "again")
    metrics = read(classifier / "again" / "metrics.json")
    assert metrics["accuracy"]["value"] == max(line["val_accuracy"] for line in history(classifier))


def data_of(out: Path) -> str:
    """The --data of the command that made a run."""
    words = read(out / "manifest.json")["command"].split()
    return words[words.index("--data") + 1]


def test_a_patience_of_one_stops_early(folder_of_classes: Path, tmp_path: Path) -> None:
    """At a rate of zero nothing improves after the first epoch."""
    arguments = ["--lr", 0, "--epochs", 9, "--patience", 1, "--out", tmp_path / "run"]
    here("classifier", "--data", folder_of_classes, *SMALL_CLASSIFIER, *arguments)
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize("loss", ["bce", "dice", "focal", "bce+dice"])
def test_every_loss_of_the_segmenter_trains(folder_of_masks: Path, tmp_path: Path, loss: str) -> None:
    here("segmenter", "--data", folder_of_masks, "--out", tmp_path, *SMALL_SEGMENTER, "--loss", loss, "--epochs", 2)
    first, second = history(tmp_path)
    assert second["train_loss"] < first["train_loss"]


def test_a_batch_is_no_larger_than_the_training_part(folder_of_classes: Path, tmp_path: Path) -> None:
    words = ["--batch-size", 500, "--optimizer", "adamw", "--per-class", 20, 5, "--epochs", 1]
    here("classifier", "--data", folder_of_classes, "--out", tmp_path / "run", *SMALL_CLASSIFIER, *words)
    data = checkpoint.load(tmp_path / "run").config["data"]
    assert {part: len(each) for part, each in data["fingerprints"].items()} == {"train": 40, "val": 10, "test": 10}
    assert runs.state(tmp_path / "run").name == "step-1"


@pytest.mark.parametrize("options", [["--mixup", 0.3], ["--cutmix", 1]])
def test_mixed_images_are_trained_on(options: list, classifier: Path, folder_of_classes: Path, tmp_path: Path) -> None:
    """Colours are learned in an epoch; of mixed ones nothing is certain, which the training loss shows."""
    words = ["--data", folder_of_classes, *SMALL_CLASSIFIER, "--schedule", "constant", *options]
    here("classifier", *words, "--out", tmp_path)
    assert history(tmp_path)[-1]["train_loss"] > history(classifier)[-1]["train_loss"] + 0.05


def test_bf16_is_trained_in(classifier: Path, folder_of_classes: Path, tmp_path: Path) -> None:
    """Of fp32 it is seen by rounding alone: its 8 bits are 2 to 3 decimal digits. A process has one precision."""
    words = ["--data", folder_of_classes, *SMALL_CLASSIFIER, "--schedule", "constant", "--epochs", 1]
    runs.as_process("classifier", *words, "--precision", "bf16", "--out", tmp_path)
    found, expected = history(tmp_path)[0]["train_loss"], history(classifier)[0]["train_loss"]
    assert 1e-6 < abs(found - expected) < 0.05
    assert read(tmp_path / "manifest.json")["precision"] == checkpoint.load(tmp_path).config["precision"] == "bf16"


def test_the_epoch_that_is_kept_is_the_one_that_curves_and_card_name(folder_of_classes: Path, tmp_path: Path) -> None:
    """By loss: another epoch than by accuracy, which is a half twice while the loss falls."""
    words = ["--data", folder_of_classes, *SMALL_CLASSIFIER, "--best-by", "loss", "--epochs", 2, "--lr", 0.02]
    here("classifier", *words, "--out", tmp_path)
    lines, manifest = history(tmp_path), read(tmp_path / "manifest.json")
    by_loss = min(lines, key=lambda line: line["val_loss"])["epoch"]
    assert by_loss != max(lines, key=lambda line: line["val_accuracy"])["epoch"]
    assert manifest["best_epoch"] == by_loss
    drawn = np.asarray(Image.open(tmp_path / "report" / "curves.png"))
    assert np.array_equal(drawn, np.asarray(plots.curves(lines, by_loss)))
    assert not np.array_equal(drawn, np.asarray(plots.curves(lines)))
    assert f"weights kept: epoch {by_loss}, the best on val by loss\n" in (tmp_path / "README.md").read_text()


def test_evaluation_of_a_classifier_counts_the_test_part_once(classifier: Path) -> None:
    here("evaluate", classifier, "--data", data_of(classifier))
    metrics = read(classifier / "metrics.json")
    assert metrics["part"] == "test"
    assert metrics["n"] == 8
    assert metrics["accuracy"]["low"] <= metrics["accuracy"]["value"] <= metrics["accuracy"]["high"]
    rows = metrics["classes"].values()
    assert metrics["balanced_accuracy"]["value"] == pytest.approx(np.mean([row["recall"] for row in rows]))
    assert metrics["macro_f1"]["value"] == pytest.approx(np.mean([row["f1-score"] for row in rows]))
    assert "balanced accuracy" in (classifier / "README.md").read_text()
    assert len((classifier / "test_reads.jsonl").read_text().splitlines()) == 1
    report = (classifier / "report" / "README.md").read_text()
    for picture in ("confusion_matrix.png", "reliability.png", "photos/grad_cam.png"):
        assert picture in report
        assert Image.open(classifier / "report" / picture).width > 100


def test_evaluation_of_a_segmenter_equals_a_count_by_hand(segmenter: Path) -> None:
    """All pixels of the test part at the photos' own resolution, counted one image at a time in NumPy."""
    data = Path(data_of(segmenter))
    here("evaluate", segmenter, "--data", data, "--compare", segmenter)
    metrics = read(segmenter / "metrics.json")
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
        here("evaluate", classifier, "--data", data, "--out", tmp_path / "report")
        metrics = read(tmp_path / "report" / "metrics.json")
        scores.append((metrics["n"], metrics["accuracy"], metrics["expected_calibration_error"]))
    assert scores[0] == scores[1]
    here("evaluate", classifier, "--data", tmp_path / "renamed", "--part", "all", "--out", tmp_path / "report")
    assert read(tmp_path / "report" / "metrics.json")["n"] == 60
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
    assert named in last_words(*arguments, *out)


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("classifier", "--epochs", 0),
        ("classifier", "--batch-size", 0),
        ("classifier", "--image-size", -64),
        ("classifier", "--lr", "nan"),
        ("classifier", "--lr", "inf"),
        ("classifier", "--depth", 0),
        ("classifier", "--widths", "16 0"),
        ("classifier", "--crop-pct", 0),
        ("classifier", "--dropout", 1.5),
        ("classifier", "--classes", 1),
        ("classifier", "--per-class", "5 0"),
        ("segmenter", "--width", 0),
        ("segmenter", "--depth", 0),
        ("segmenter", "--depth", -1),
        ("transfer", "--finetune-epochs", -1),
        ("transfer", "--views", -1),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_before_anything_is_made(
    script: str, option: str, value: object, tmp_path: Path
) -> None:
    assert option in last_words(script, option, *str(value).split(), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_can_start_from_a_trained_model(segmenter: Path, tmp_path: Path) -> None:
    """At a rate of zero it scores from the first epoch what the other scored in the end, at a larger size too."""
    arguments = ["--data", data_of(segmenter), *SMALL_SEGMENTER, "--start-from", segmenter, "--epochs", 1]
    here("segmenter", *arguments, "--lr", 0, "--out", tmp_path / "same")
    (line,) = history(tmp_path / "same")
    best = max(each["val_iou"] for each in history(segmenter))
    assert line["val_iou"] == pytest.approx(best, abs=0.05)  # BatchNorm's statistics move on
    assert "started_from" in (tmp_path / "same" / "manifest.json").read_text()
    assert "another network" in last_words("segmenter", *arguments, "--width", 8, "--out", tmp_path / "other")


def test_without_data_both_scripts_learn_synthetic_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped checkpoints were made by these commands without options: here one epoch of few and small scenes."""
    few_scenes = {part: seeds[:200] for part, seeds in parts.SHAPES_SEEDS.items()}
    monkeypatch.setattr(parts, "SHAPES_SEEDS", few_scenes)
    few = ["--epochs", 1, "--image-size", 32, "--precision", "fp32"]
    here("classifier", *few, "--out", tmp_path / "classifier", "--widths", 4, 8)
    here("segmenter", *few, "--out", tmp_path / "segmenter", "--width", 2)
    assert checkpoint.load(tmp_path / "classifier").class_names == shapes.CLASS_NAMES
    assert 0 < history(tmp_path / "segmenter")[0]["val_iou"] < 1


def test_a_training_for_other_classes_starts_with_a_new_head(
    classifier: Path, folder_of_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At a rate of zero the rest is what was trained; the head is that of a training that starts from nothing."""
    shutil.copytree(folder_of_classes, tmp_path / "data")
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "green")
    shutil.copytree(tmp_path / "data" / "blue", tmp_path / "three" / "blue")
    runs.noise(tmp_path / "three", "gr", 20)
    words = [*SMALL_CLASSIFIER, "--lr", 0, "--epochs", 1]
    trained = kept(classifier)
    for data in ("data", "three"):
        here("classifier", *words, "--data", tmp_path / data, "--out", tmp_path / f"{data}-new")
        capsys.readouterr()
        more = ["--start-from", classifier]
        here("classifier", *words, *more, "--data", tmp_path / data, "--out", tmp_path / f"{data}-from")
        assert "blue, red" in capsys.readouterr().out
        found, new = kept(tmp_path / f"{data}-from"), kept(tmp_path / f"{data}-new")
        for name in found:
            if name.startswith("head"):
                assert found[name].equal(new[name])
            elif "running" not in name and "num_batches" not in name:
                assert found[name].equal(trained[name])


@pytest.mark.parametrize(
    ("script", "words"),
    [("classifier", ["--image-size", 8]), ("segmenter", ["--image-size", 50]),
     ("transfer", ["--backbone", "test_convnext", "--no-pretrained", "--image-size", 98])],
)  # fmt: skip
def test_an_image_size_that_cannot_be_taken_is_said_before_the_run_is_made(
    script: str, words: list, tmp_path: Path
) -> None:
    assert str(words[-1]) in last_words(script, *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["classifier", "transfer"])
def test_balanced_weights_are_trained_with(script: str, tmp_path: Path) -> None:
    """28 pictures against 4 in train: with weights another loss falls."""
    runs.noise(tmp_path / "data", "ab", 40)
    for path in sorted((tmp_path / "data" / "b").iterdir())[6:]:
        path.unlink()
    words = ["--data", tmp_path / "data", "--image-size", 32, "--batch-size", 64, "--epochs", 2, "--precision", "fp32"]
    words += ["--backbone", "test_resnet", "--no-pretrained"] if script == "transfer" else ["--widths", 4, 8]
    losses = []
    for weights in ("none", "balanced"):
        here(script, *words, "--class-weights", weights, "--out", tmp_path / weights)
        losses.append([line["train_loss"] for line in history(tmp_path / weights)])
    assert abs(losses[0][1] - losses[1][1]) > 1e-4
