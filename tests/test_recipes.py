"""Every recipe of the trainers from scratch takes a few steps; a recipe sets defaults; wrong names are answered."""

import importlib
import math
import sys
from pathlib import Path

import cli
import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import here, history, kept, last, read, same, without_time

from cvlab import checkpoint, render
from cvlab.data.evaluation import parts_of
from cvlab.models import build
from cvlab.transforms import open_image, square_view, to_uint8

SMALL = ["--image-size", 32, "--epochs", 1, "--precision", "fp32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each script: three classes of eight photos, and twelve photos with masks."""
    root = tmp_path_factory.mktemp("photos")
    return {"classifier": runs.noise(root / "classifier"), "segmenter": runs.discs(root / "segmenter", 12)}


@pytest.mark.parametrize("name", [path.stem for path in runs.RECIPES])
def test_a_recipe_takes_two_steps(name: str, photos: dict, tmp_path: Path) -> None:
    recipe = cli.read_recipe(name)
    assert all(recipe["report"][key] for key in ("system", "row", "figure"))
    if recipe["script"] not in photos:
        pytest.skip(f"of {recipe['script']}.py, tested there")
    few = ["--batch-size", 4] + ["--per-class", 3, 1] * ("per_class" in recipe["options"])
    few += ["--image-size", 48] * ("padding" in recipe["options"])  # without it less is left of a small image
    few += ["--no-pretrained"] * ("backbone" in recipe["options"])
    data = photos[recipe["script"]]
    here(recipe["script"], "--recipe", name, *SMALL, *few, "--data", data, "--out", tmp_path)
    (line,) = history(tmp_path)
    assert math.isfinite(line["train_loss"] + line["val_loss"])
    assert read(tmp_path / "manifest.json")["recipe"] == name
    config = checkpoint.load(tmp_path).config
    usual = {"classifier": "convnet"}.get(recipe["script"], "smp" if "backbone" in recipe["options"] else "unet")
    assert config["network"] == recipe["options"].get("network", usual)
    asked = {key: value for key, value in recipe["options"].items() if key in config["arguments"]}
    assert asked.items() <= config["arguments"].items()


def test_a_recipe_sets_defaults_and_the_command_line_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train/classifier.py"])
    recipe = ['script = "classifier"', "[options]", "lr = 0.5", "widths = [3, 4]", "hidden = []"]
    recipe += ['augment = "none"', "batch_norm = true", "resume = false"]
    (tmp_path / "mine.toml").write_text("\n".join(recipe))
    monkeypatch.setattr(cli, "RECIPES", tmp_path)
    parse = importlib.import_module("classifier").parser().parse_args
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--recipe", "mine"])
    args = parse()
    assert (args.lr, args.widths, args.hidden, args.augment, args.batch_norm) == (0.5, [3, 4], [], "none", True)
    assert (args.out, args.epochs, args.resume) == (Path("runs/mine"), 36, False)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr", "1", "--augment", "--widths", "9", "--out", "there"])
    args = parse()
    assert (args.lr, args.widths, args.augment, args.out) == (1.0, [9], "full", Path("there"))


def test_pictures_alone_are_explained_as_a_recipe_says(photos: dict, tmp_path: Path) -> None:
    """The published looks with a small model in the place of VGG-16: jet over the photo, at 0.4."""
    torch.manual_seed(0)
    model = build("convnet", ["a", "b"], 32, {"widths": [4, 8]}).eval()
    checkpoint.save(model, tmp_path)
    paths = [photos["classifier"] / "a" / f"{i}.png" for i in range(2)]
    here("evaluate", tmp_path, "--recipe", "vgg16-grad-cam", "--stage", "stage1", "--images", *paths, "--out", tmp_path)
    drawn = Image.open(tmp_path / "report" / "photos" / "explained.png")
    views = torch.stack([to_uint8(square_view(open_image(path), model)) for path in paths])
    expected = render.grad_cam_rows(model, views, ["0.png", "1.png"], "stage1", "jet", 0.4)
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    with pytest.raises(ValueError, match="stage1, stage2"):
        here("evaluate", tmp_path, "--recipe", "vgg16-grad-cam", "--images", paths[0], "--out", tmp_path)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('optimizer = "adamm"', "adamm"),
        ("epochs = 1.5", "1.5"),
        ('lr = "fast"', "fast"),
        ("widths = [3.5]", "3.5"),
        ("augment = false", "False"),
    ],
)
def test_a_value_that_the_option_does_not_take_is_named(
    line: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(f'script = "classifier"\n[options]\n{line}\n')
    monkeypatch.setattr(cli, "RECIPES", tmp_path)
    with pytest.raises(ValueError, match=named):
        here("classifier", "--recipe", "mine", "--out", tmp_path / "run")


def test_the_list_has_the_script_s_own_recipes_and_their_figures(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        here("segmenter", "--list-recipes")
    table = capsys.readouterr().out
    assert "horses-unet" in table
    assert "0.7964" in table
    assert "flowers5" not in table


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--recipe", "flower5-basics"], "flowers5-basic"),
        (["--recipe", "horses-unet"], "train/segmenter.py --recipe horses-unet"),
        (["--recipe", "flowers5-basic"], "--data"),
        (["--recipe", "mine"], "weight_decay"),
    ],
)
def test_a_recipe_that_cannot_be_followed_says_what_can(
    words: list, answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in runs.RECIPES:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "mine.toml").write_text('script = "classifier"\n[options]\nweight_dacay = 0\n')
    monkeypatch.setattr(cli, "RECIPES", tmp_path)
    with pytest.raises(ValueError, match=answer):
        here("classifier", *words)


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        here("classifier", "--widhts", 3)
    assert "--widths" in capsys.readouterr().err.splitlines()[-1]


def test_an_option_of_another_network_is_refused(photos: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden"):
        here("classifier", "--data", photos["classifier"], *SMALL, "--hidden", 4, "--out", tmp_path)


@pytest.mark.parametrize("zoom", [(2, 1), (0, 1)])
def test_a_zoom_that_is_none_is_refused_before_anything_is_written(zoom: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zoom"):
        here("segmenter", "--zoom", *zoom, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_average_of_the_weights_and_the_plateau_are_resumed(photos: dict, tmp_path: Path) -> None:
    words = ["--data", photos["classifier"], *SMALL, "--batch-size", 4, "--widths", 4, 8, "--best-by", "loss"]
    words += ["--ema", 0.9, "--clip-norm", 0.1, "--schedule", "plateau", "--lr", 0.01]
    here("classifier", *words, "--epochs", 3, "--out", tmp_path / "whole")
    here("classifier", *words, "--epochs", 1, "--out", tmp_path / "stopped")
    here("classifier", *words, "--epochs", 3, "--out", tmp_path / "stopped", "--resume")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert same(kept(stopped), kept(whole))
    assert without_time(stopped) == without_time(whole)
    best = min(history(whole), key=lambda line: line["val_loss"])["epoch"]
    assert read(whole / "manifest.json")["best_epoch"] == best
    assert not last(whole)["head.weight"].equal(kept(whole)["head.weight"])


def test_clipped_gradients_move_no_weight_farther_than_rate_times_norm_in_a_step(photos: dict, tmp_path: Path) -> None:
    """Plain SGD at a rate of 1: eight steps of length 1e-3 at most, from the same first weights."""
    words = ["--data", photos["classifier"], *SMALL, "--batch-size", 2, "--widths", 4, "--ema", 0]
    words += ["--optimizer", "sgd", "--momentum", 0, "--weight-decay", 0, "--schedule", "constant"]
    settings = {"still": [0, 0], "clipped": [1, 1e-3], "free": [1, 0]}
    for name, (lr, norm) in settings.items():
        here("classifier", *words, "--lr", lr, "--clip-norm", norm, "--out", tmp_path / name)
    first, clipped, free = (
        torch.cat([value.flatten() for key, value in last(tmp_path / name).items() if key.endswith(("weight", "bias"))])
        for name in settings
    )
    assert 0 < (clipped - first).norm() <= 8.1e-3 < (free - first).norm()


def test_without_augmentation_every_epoch_shows_the_same_views(photos: dict, tmp_path: Path) -> None:
    """At a rate of zero and without batch statistics the loss then stays what it is."""
    words = ["--network", "plain", "--widths", 4, "--hidden", "--batch-size", 6, "--lr", 0, "--label-smoothing", 0]
    losses = {}
    for name in ("--augment", "--no-augment"):
        here(
            "classifier", "--data", photos["classifier"], *SMALL, *words, name, "--epochs", 2, "--out", tmp_path / name
        )
        losses[name] = [line["train_loss"] for line in history(tmp_path / name)]
    assert losses["--no-augment"][0] == pytest.approx(losses["--no-augment"][1], rel=1e-6)
    assert losses["--augment"][0] != pytest.approx(losses["--augment"][1], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ([], ("center", "full", False)),
        (["--resize", "squash", "--augment", "minimal", "--normalize", "imagenet"], ("squash", "minimal", True)),
        (["--resize", "squash", "--augment"], ("squash", "full", False)),
        (["--no-augment", "--decay", "all"], ("center", "none", False)),
    ],
)
def test_how_photos_are_shown_is_kept_with_the_model(words: list, seen: tuple, photos: dict, tmp_path: Path) -> None:
    few = ["--data", photos["classifier"], *SMALL, "--widths", 4, "--batch-size", 4]
    here("classifier", *few, *words, "--out", tmp_path)
    model = checkpoint.load(tmp_path)
    assert (model.crop_mode, model.config["mean"] == [0.485, 0.456, 0.406]) == (seen[0], seen[2])
    assert importlib.import_module("classifier").parser().parse_args(list(map(str, words))).augment == seen[1]
    square = square_view(Image.open(photos["classifier"] / "a" / "0.png"), model)
    assert square.size == (32, 32)


def test_a_u_net_takes_the_same_options(photos: dict, tmp_path: Path) -> None:
    few = ["--data", photos["segmenter"], *SMALL, "--width", 4, "--depth", 1, "--batch-size", 4]
    words = ["--augment", "minimal", "--normalize", "imagenet", "--decay", "all", "--resize", "squash"]
    here("segmenter", *few, *words, "--out", tmp_path)
    assert checkpoint.load(tmp_path).config["mean"] == [0.485, 0.456, 0.406]


def test_the_first_classes_are_taken_and_known_to_the_model(photos: dict, tmp_path: Path) -> None:
    words = ["--data", photos["classifier"], *SMALL, "--widths", 4, "--classes", 2, "--batch-size", 4]
    here("classifier", *words, "--out", tmp_path)
    model = checkpoint.load(tmp_path)
    assert (model.class_names, model.config["data"]["classes"]) == (["a", "b"], 2)
    parts, trained_on = parts_of(model, photos["classifier"], "all")
    assert (len(parts.samples["all"]), trained_on) == (16, 12)
