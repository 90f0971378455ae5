"""Every recipe of the trainers from scratch takes a few steps; a recipe sets defaults; wrong names are answered."""

import importlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cvlab import checkpoint, render
from cvlab.data.evaluation import parts_of
from cvlab.models import build
from cvlab.transforms import open_image, square_view, to_uint8

TRAIN = Path(__file__).resolve().parents[1] / "train"
RECIPES = sorted((TRAIN / "recipes").glob("*.toml"))
SMALL = ["--image-size", 32, "--epochs", 1, "--precision", "fp32"]


@pytest.fixture(scope="module", autouse=True)
def options() -> Iterator[object]:
    """train/options.py; the scripts are run in this process, as importing torch takes longer than two steps."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.path.insert(0, str(TRAIN))
    yield importlib.import_module("cli")
    sys.path.remove(str(TRAIN))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable:
    def run_script(script: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"train/{script}.py", *map(str, words)])
        importlib.import_module(script).main()

    return run_script


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each script: three classes of eight photos, and twelve photos with masks."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [root / "classifier" / name / f"{i}.png" for name in "abc" for i in range(8)]
    paths += [root / "segmenter" / "images" / f"{i}.png" for i in range(12)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 56, 3), dtype=np.uint8)).save(path)
    (root / "segmenter" / "masks").mkdir()
    for i in range(12):
        Image.fromarray(255 * rng.integers(0, 2, (50, 56), dtype=np.uint8)).save(
            root / "segmenter" / "masks" / f"{i}.png"
        )
    return {script: root / script for script in ("classifier", "segmenter")}


def history(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_takes_two_steps(name: str, photos: dict, options: object, run: Callable, tmp_path: Path) -> None:
    recipe = options.read_recipe(name)
    assert all(recipe["report"][key] for key in ("system", "row", "figure"))
    if recipe["script"] not in photos:
        pytest.skip(f"of {recipe['script']}.py, tested there")
    few = ["--batch-size", 4] + ["--per-class", 3, 1] * ("per_class" in recipe["options"])
    few += ["--image-size", 48] * ("padding" in recipe["options"])  # without it less is left of a small image
    data = photos[recipe["script"]]
    run(recipe["script"], "--recipe", name, *SMALL, *few, "--data", data, "--out", tmp_path)
    (line,) = history(tmp_path)
    assert math.isfinite(line["train_loss"] + line["val_loss"])
    assert json.loads((tmp_path / "manifest.json").read_text())["recipe"] == name
    config = checkpoint.load(tmp_path).config
    assert config["network"] == recipe["options"].get(
        "network", {"classifier": "convnet"}.get(recipe["script"], "unet")
    )
    asked = {key: value for key, value in recipe["options"].items() if key in config["arguments"]}
    assert asked.items() <= config["arguments"].items()


def test_a_recipe_sets_defaults_and_the_command_line_decides(
    options: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train/classifier.py"])
    recipe = ['script = "classifier"', "[options]", "lr = 0.5", "widths = [3, 4]", "hidden = []"]
    recipe += ["augment = false", "batch_norm = true", "resume = false"]
    (tmp_path / "mine.toml").write_text("\n".join(recipe))
    monkeypatch.setattr(options, "RECIPES", tmp_path)
    parse = importlib.import_module("classifier").parser().parse_args
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--recipe", "mine"])
    args = parse()
    assert (args.lr, args.widths, args.hidden, args.augment, args.batch_norm) == (0.5, [3, 4], [], False, True)
    assert (args.out, args.epochs, args.resume) == (Path("runs/mine"), 36, False)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr", "1", "--augment", "--widths", "9", "--out", "there"])
    args = parse()
    assert (args.lr, args.widths, args.augment, args.out) == (1.0, [9], True, Path("there"))


def test_pictures_alone_are_explained_as_a_recipe_says(
    photos: dict, options: object, run: Callable, tmp_path: Path
) -> None:
    """The published looks with a small model in the place of VGG-16: jet over the photo, at 0.4."""
    torch.manual_seed(0)
    model = build("convnet", ["a", "b"], 32, {"widths": [4, 8]}).eval()
    checkpoint.save(model, tmp_path)
    paths = [photos["classifier"] / "a" / f"{i}.png" for i in range(2)]
    run("evaluate", tmp_path, "--recipe", "vgg16-grad-cam", "--stage", "stage1", "--images", *paths, "--out", tmp_path)
    drawn = Image.open(tmp_path / "report" / "photos" / "explained.png")
    views = torch.stack([to_uint8(square_view(open_image(path), model)) for path in paths])
    expected = render.grad_cam_rows(model, views, ["0.png", "1.png"], "stage1", "jet", 0.4)
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    with pytest.raises(ValueError, match="stage1, stage2"):
        run("evaluate", tmp_path, "--recipe", "vgg16-grad-cam", "--images", paths[0], "--out", tmp_path)


def test_the_list_has_the_script_s_own_recipes_and_their_figures(run: Callable, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("segmenter", "--list-recipes")
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
    words: list, answer: str, options: object, run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in RECIPES:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "mine.toml").write_text('script = "classifier"\n[options]\nweight_dacay = 0\n')
    monkeypatch.setattr(options, "RECIPES", tmp_path)
    with pytest.raises(ValueError, match=answer):
        run("classifier", *words)


def test_an_unknown_option_names_the_nearest(run: Callable, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("classifier", "--widhts", 3)
    assert "--widths" in capsys.readouterr().err.splitlines()[-1]


def test_an_option_of_another_network_is_refused(photos: dict, run: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden"):
        run("classifier", "--data", photos["classifier"], *SMALL, "--hidden", 4, "--out", tmp_path)


@pytest.mark.parametrize("zoom", [(2, 1), (0, 1)])
def test_a_zoom_that_is_none_is_refused_before_anything_is_written(zoom: tuple, run: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zoom"):
        run("segmenter", "--zoom", *zoom, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_average_of_the_weights_and_the_plateau_are_resumed(photos: dict, run: Callable, tmp_path: Path) -> None:
    words = ["--data", photos["classifier"], *SMALL, "--batch-size", 4, "--widths", 4, 8, "--best-by", "loss"]
    words += ["--ema", 0.9, "--clip-norm", 0.1, "--schedule", "plateau", "--lr", 0.01]
    run("classifier", *words, "--epochs", 3, "--out", tmp_path / "whole")
    run("classifier", *words, "--epochs", 1, "--out", tmp_path / "stopped")
    run("classifier", *words, "--epochs", 3, "--out", tmp_path / "stopped", "--resume")
    kept = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert all(tensor.equal(kept[1][key]) for key, tensor in kept[0].items())
    lines = [[{**line, "seconds": 0} for line in history(tmp_path / name)] for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    best = min(lines[0], key=lambda line: line["val_loss"])["epoch"]
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["best_epoch"] == best
    (state,) = (tmp_path / "whole" / "state").glob("step-*")
    trained = load_file(state / "model.safetensors")
    assert not trained["head.weight"].equal(kept[0]["head.weight"])


def test_without_augmentation_every_epoch_shows_the_same_views(photos: dict, run: Callable, tmp_path: Path) -> None:
    """At a rate of zero and without batch statistics the loss then stays what it is."""
    words = ["--network", "plain", "--widths", 4, "--hidden", "--batch-size", 6, "--lr", 0, "--label-smoothing", 0]
    losses = {}
    for name in ("--augment", "--no-augment"):
        run("classifier", "--data", photos["classifier"], *SMALL, *words, name, "--epochs", 2, "--out", tmp_path / name)
        losses[name] = [line["train_loss"] for line in history(tmp_path / name)]
    assert losses["--no-augment"][0] == pytest.approx(losses["--no-augment"][1], rel=1e-6)
    assert losses["--augment"][0] != pytest.approx(losses["--augment"][1], rel=1e-6)


def test_the_first_classes_are_taken_and_known_to_the_model(
    photos: dict, options: object, run: Callable, tmp_path: Path
) -> None:
    words = ["--data", photos["classifier"], *SMALL, "--widths", 4, "--classes", 2, "--batch-size", 4]
    run("classifier", *words, "--out", tmp_path)
    model = checkpoint.load(tmp_path)
    assert (model.class_names, model.config["data"]["classes"]) == (["a", "b"], 2)
    parts, trained_on = parts_of(model, photos["classifier"], "all")
    assert (len(parts.samples["all"]), trained_on) == (16, 12)
