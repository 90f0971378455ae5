"""Maps of many pictures, also by train/explain.py: every picture once, killed or not. And of one photo by it."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import read

from cvlab import checkpoint
from cvlab.explain import class_score, explain, predict, predicted_masks, predicted_score
from cvlab.explain.many import describe, explain_predictions, likeness, predict_photos
from cvlab.models import build
from cvlab.render import enlarged, mask_overlay, overlay
from cvlab.transforms import open_image, resize_logits, to_uint8, view
from cvlab.trust.diagnosis import diagnose

ROOT = Path(__file__).resolve().parents[1]


# --- functions --------------------------------------------------------------------------------------------------------


def test_predictions_are_explained_as_by_explain(model, images):
    if model.task == "segmentation":
        model.threshold = predict(model, images)[:, 0].sigmoid().median().item()
    found, expected = explain_predictions(model, images), explain(model, images, predicted_score(model))
    assert torch.equal(found.scores, expected.scores)
    for stage, maps in expected.maps["grad_cam"].items():
        torch.testing.assert_close(found.maps["grad_cam"][stage], maps)


def test_a_picture_without_a_mask_is_blank_and_the_others_are_not(segmenter, images):
    largest = predict(segmenter, images).sigmoid().flatten(1).amax(1)
    segmenter.threshold = largest.sort().values[:2].mean().item()  # of one picture no pixel reaches it
    empty = int(largest.argmin())
    found = explain_predictions(segmenter, images, methods=["grad_cam", "hires_cam"])
    lines = describe(segmenter, found)
    for i, line in enumerate(lines):
        assert (line["prediction"] in ("horse", "rider"), line["share"] > 0) == (i != empty, i != empty)
        assert (line["score"] == 0) == (i == empty)
        for stages in found.maps.values():
            assert all(maps[i].any() == (i != empty) for maps in stages.values())


def test_a_line_says_what_was_predicted(classifier, images):
    found = explain_predictions(classifier, images, ["stage2"])
    lines = describe(classifier, found)
    logits = predict(classifier, images)
    assert [line["prediction"] for line in lines] == [["cat", "dog", "fox"][i] for i in logits.argmax(1)]
    assert [line["score"] for line in lines] == pytest.approx(logits.amax(1).tolist())
    peaks = found.maps["grad_cam"]["stage2"].amax((1, 2, 3)).relu() * 16
    assert [line["peak"]["grad_cam"]["stage2"] for line in lines] == pytest.approx(peaks.tolist())


def test_likeness_by_hand():
    maps = torch.tensor([[[[0.0, 1.0], [2.0, -4.0]]]])
    others = torch.cat([maps, 3 * maps, -maps, 0 * maps, maps.flip(3)])
    assert likeness(maps.expand(5, -1, -1, -1), others)[:4].tolist() == pytest.approx([1, 1, -1, 0])
    enlarged = torch.nn.functional.interpolate(maps, scale_factor=3, mode="bilinear")
    assert likeness(enlarged, maps).item() == pytest.approx(1)  # at the finer resolution


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures, dark ones to the left and bright ones to the right, one of them no picture at all."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, darkest in (("left", 0), ("right", 130)):
        (folder / name).mkdir()
        for i in range(12):
            Image.fromarray(rng.integers(darkest, darkest + 120, (20, 24, 3), dtype=np.uint8)).save(
                folder / name / f"{i:02d}.png"
            )
    (folder / "left" / "05.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny model for them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = build("convnet", ["left", "right"], 16, {"widths": [4, 8]}).eval()
    with torch.no_grad():  # so that dark and bright ones are predicted to be different
        model.head.bias -= model(torch.tensor([0.24, 0.75])[:, None, None, None].expand(2, 3, 16, 16)).mean(0)
    checkpoint.save(model, folder, data={"name": "pictures", "split_seed": 0})
    return folder


def command(folder, pictures, out, *more):
    arguments = [folder, "--data", pictures, "--part", "all", "--out", out, "--batch-size", "2", *more]
    return [sys.executable, "train/explain.py", *map(str, arguments)]


@pytest.fixture
def explain_py(monkeypatch, capsys):
    """Runs the script in this process, which has its imports already; returns what it printed and its error."""
    monkeypatch.syspath_prepend(str(ROOT / "train"))

    def run_it(*words):
        monkeypatch.setattr(sys, "argv", ["train/explain.py", *map(str, words)])
        error = ""
        try:
            runpy.run_path(str(ROOT / "train" / "explain.py"), run_name="__main__")
        except SystemExit as stop:
            error = str(stop)
        return capsys.readouterr().out, error

    return run_it


@pytest.fixture
def run(explain_py):
    """The same for all pictures."""
    return lambda *arguments: explain_py(*command(*arguments)[2:])


def contents(out):
    """The lines of the manifest, and every array of every batch."""
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    arrays = {}
    for path in sorted((out / "maps").iterdir()):
        with np.load(path) as batch:
            arrays |= {(path.name, key): batch[key] for key in batch if key != "lines"}
    return lines, arrays


def test_a_killed_run_goes_on_to_what_an_undisturbed_one_gives(folder, pictures, tmp_path, run):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(folder, pictures, killed), cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(killed.glob("maps/*.npz"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = {path: path.stat().st_mtime_ns for path in killed.glob("maps/*.npz")}
    for path in left:
        np.load(path)["lines"]  # whole, wherever it was killed
    assert run(folder, pictures, killed)[1] == ""
    assert all(path.stat().st_mtime_ns == written for path, written in left.items())  # not made again

    printed, error = run(folder, pictures, whole)
    assert error == ""
    lines, arrays = contents(whole)
    assert len(lines) == 23
    assert "left/05.png" not in {line["file"] for line in lines}
    assert "05.png" in printed

    lines_of_killed, arrays_of_killed = contents(killed)
    assert lines_of_killed == lines
    assert arrays_of_killed.keys() == arrays.keys()
    assert all(np.array_equal(arrays_of_killed[key], values) for key, values in arrays.items())

    # What a line points at is the map that it describes.
    for line in lines:
        for stage, value in line["peak"]["grad_cam"].items():
            raw = arrays[line["batch"], f"grad_cam/{stage}"][line["row"]]
            assert max(raw.max(), 0) * raw.size == pytest.approx(value)


def test_two_processes_write_the_bytes_of_one(folder, pictures, tmp_path, run):
    assert run(folder, pictures, tmp_path / "one")[1] == ""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, *torchrun, *command(folder, pictures, tmp_path / "two")[1:]]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=400)
    one, two = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) == 14  # twelve batches
    assert one == two


def test_other_settings_need_another_folder(folder, pictures, tmp_path, run):
    more = ["--stages", "stage1", "--methods", "hires_cam"]
    assert run(folder, pictures, tmp_path, *more)[1] == ""
    lines, arrays = contents(tmp_path)
    assert {key for _, key in arrays} == {"hires_cam/stage1"}
    assert "--out" in run(folder, pictures, tmp_path, *more[:-1], "grad_cam")[1]
    assert contents(tmp_path)[0] == lines


# --- one photo --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(pictures):
    """24 x 20 pixels: a classifier for 16 x 16 sees the 20 x 20 in the middle."""
    return pictures / "right" / "00.png"


def arrays_in(out):
    with np.load(out / "maps.npz") as arrays:
        return {name: arrays[name] for name in arrays}


def test_a_photo_of_a_classifier(folder, photo, tmp_path, explain_py):
    explain_py(folder, photo, "--out", tmp_path, "--methods", "grad_cam", "hires_cam")
    model, told, arrays = checkpoint.load(folder), read(tmp_path / "manifest.json"), arrays_in(tmp_path)
    images = view(open_image(photo), model)
    found = explain(model, images, predicted_score(model), methods=["grad_cam", "hires_cam"])
    part = open_image(photo).crop((2, 0, 22, 20)).resize((320, 320), Image.Resampling.BICUBIC)
    assert set(arrays) == {f"{method}/{stage}" for method in found.maps for stage in model.stages}
    for method, maps in found.maps.items():
        for stage, expected in maps.items():
            assert arrays[f"{method}/{stage}"].dtype == np.float32
            assert np.allclose(arrays[f"{method}/{stage}"], expected[0, 0], atol=1e-7)
            drawn = to_uint8(overlay(to_uint8(part)[None] / 255, expected, stage=model.stages[stage])).int()
            assert (to_uint8(Image.open(tmp_path / f"{method}-{stage}.png")) - drawn).abs().max() <= 1
            warning = diagnose(expected, found.logits, found.logits.argmax().item())
            assert told["warnings"][method].get(stage, "") == warning
            assert told["peak"][method][stage] == pytest.approx(expected.max().relu().item() * expected.numel())
    assert (told["file"], told["prediction"], told["explained"]) == (str(photo), "left", "left")
    assert list(told["probabilities"].values()) == pytest.approx(found.logits.softmax(1)[0].tolist())
    assert told["score"] == pytest.approx(found.scores.item())
    assert len(list(tmp_path.iterdir())) == len(arrays) + 2
    last = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= last for path in tmp_path.iterdir())


def test_another_class_than_the_predicted_one(folder, photo, tmp_path, explain_py):
    explain_py(folder, photo, "--out", tmp_path, "--class", "right", "--stages", "stage2")
    model, told = checkpoint.load(folder), read(tmp_path / "manifest.json")
    found = explain(model, view(open_image(photo), model), class_score(1), ["stage2"])
    assert np.allclose(arrays_in(tmp_path)["grad_cam/stage2"], found.maps["grad_cam"]["stage2"][0, 0], atol=1e-7)
    assert (told["prediction"], told["explained"]) == ("left", "right")
    assert told["score"] == pytest.approx(found.scores.item())


def save_segmenter(folder, **options):
    """A segmenter that finds each class in about half of a view."""
    torch.manual_seed(0)
    model = build("unet", ["horse", "rider"], 16, {"width": 4, "depth": 2}, **options).eval()
    with torch.no_grad():
        model.head.bias -= model(torch.rand(4, 3, 16, 16)).transpose(0, 1).flatten(1).median(1).values
    checkpoint.save(model, folder)
    return model


@pytest.mark.parametrize("crop_mode", ["center", "tiles"])
def test_a_photo_of_a_segmenter_is_explained_and_masked(crop_mode, pictures, tmp_path, explain_py):
    model, photo, out = save_segmenter(tmp_path, crop_mode=crop_mode), pictures / "left" / "00.png", tmp_path / "out"
    explain_py(tmp_path, photo, "--out", out, "--class", "rider")
    image = open_image(photo)
    if crop_mode == "tiles":
        (logits,) = predict_photos(model, [to_uint8(image)])
    else:
        logits = predict(model, view(image, model))
    shares = predicted_masks(model, logits)[0].float().mean((1, 2))
    assert list(read(out / "manifest.json")["shares"].values()) == pytest.approx(shares.tolist(), abs=0.05)
    assert set(arrays_in(out)) == {f"grad_cam/{stage}" for stage in model.stages}

    if crop_mode == "center":
        mask = predicted_masks(model, resize_logits(logits, (20, 24)))[0, 1]
        assert np.array_equal(Image.open(out / "mask.png"), enlarged(mask_overlay(image, mask.numpy())))


def test_nothing_found_is_said_and_drawn(pictures, tmp_path, explain_py):
    save_segmenter(tmp_path, threshold=0.9999)
    explain_py(tmp_path, pictures / "left" / "00.png", "--out", tmp_path / "out")
    told = read(tmp_path / "out" / "manifest.json")
    assert (told["prediction"], told["score"], told["shares"]) == (None, 0, {"horse": 0, "rider": 0})
    assert told["notes"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mask.png", "maps.npz", "manifest.json"}
    assert not arrays_in(tmp_path / "out")


def test_a_photo_that_fails_leaves_no_manifest(folder, photo, pictures, tmp_path, explain_py):
    out = tmp_path / "out"
    for wrong in ([pictures / "left" / "05.png"], [photo, "--class", "middle"], [photo, "--data", pictures]):
        assert explain_py(folder, *wrong, "--out", out)[1]
        assert not out.exists()
    explain_py(folder, photo, "--out", out)
    (out / "maps.npz").unlink()
    (out / "maps.npz").mkdir()  # in the way
    assert "maps.npz" in explain_py(folder, photo, "--out", out)[1]
    assert not (out / "manifest.json").exists()
