"""The audit of segmenters, by a model that fails where it is known; and an audit that is stopped and continued."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SMALL_CLASSIFIER, as_process, discs, here, read

from cvlab import checkpoint
from cvlab.audit import whole
from cvlab.audit.data import facts_of
from cvlab.audit.mistakes import worst_page
from cvlab.audit.prove import prove
from cvlab.data.evaluation import parts_of, read_photos
from cvlab.metrics import class_counts, mean_iou, segmentation_scores
from cvlab.models import Model, build

ROOT = Path(__file__).resolve().parents[1]
SIDE, COUNT = 32, 120


class Bright(Model):
    """An object is where the picture is brighter than a fixed level, or than its own mean."""

    task = "segmentation"

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.class_names, self.image_size, self.threshold, self.fixed = ["disc"], SIDE, 0.5, fixed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grey = images.mean(1, keepdim=True)
        return 50 * (grey - (0.5 if self.fixed else grey.mean((2, 3), keepdim=True)))


@pytest.fixture(scope="module")
def bright_discs():
    """Bright discs on a darker ground with the masks; a fifth of the pictures is in a third of the light."""
    draw = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centres = 10 + 12 * torch.rand(2, COUNT, 1, 1, generator=draw)
    masks = ((y - centres[0]) ** 2 + (x - centres[1]) ** 2 < 49)[:, None]
    images = 0.25 + 0.5 * masks + 0.1 * torch.rand(COUNT, 3, SIDE, SIDE, generator=draw)
    images[: COUNT // 4] *= 0.4
    return (images * 255).byte(), masks


@pytest.mark.parametrize("fixed", [True, False])
def test_a_light_of_few_pictures_is_put_into_others_and_proved_by_the_iou(bright_discs, fixed):
    views, masks = bright_discs
    facts = facts_of(views)
    dark = whole.tails(facts)["lowest brightness"]
    assert dark.sum() == pytest.approx(whole.TAIL * COUNT, abs=1)
    assert not dark[COUNT // 4 :].any()
    proposed = whole.propose(views, dark.long(), 2, facts)
    (mark,) = (each for each in proposed if (each.class_idx, each.kind) == (1, "light"))
    assert mark.gains.flatten().tolist() == pytest.approx([0.4] * 3, abs=0.1)
    model, bare = Bright(fixed), slice(COUNT // 4, None)
    proof = prove(model, mark, views[bare], masks[bare], tried=1)
    ious = [
        [mean_iou(each[None]) for each in class_counts(model(images) > 0, masks[bare])]
        for images in (views[bare] / 255, (views[bare] / 255 * mark.gains).clamp(0, 1))
    ]
    assert proof.added["value"] == pytest.approx(np.mean(ious[0]) - np.mean(ious[1]), abs=1e-6)
    assert (proof.level, proof.removed) == ("used" if fixed else "there but not used", None)


def test_the_worst_masks_come_first_with_their_errors():
    torch.manual_seed(0)
    model = build("unet", ["a <b>"], SIDE, {"width": 4, "depth": 2}).eval()
    views = torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8)
    masks = torch.ones(3, 1, SIDE, SIDE, dtype=torch.bool)
    page = worst_page(model, "<x>", views, masks, torch.tensor([0.5, 0.1, 0.9]), ["<i>0", "<i>1", "<i>2"])
    order = [page.index(f"&lt;i&gt;{i}: iou") for i in (1, 0, 2)]
    assert order == sorted(order)
    assert page.count("<img") == 4 * 3
    assert not any(raw in page for raw in ("<i>", "<x>"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A small U-Net and its data: discs, a quarter of the pictures dark."""
    folder = tmp_path_factory.mktemp("segmenter")
    data = discs(folder / "data", 160)
    for path in sorted((data / "images").iterdir())[::4]:
        Image.fromarray((np.asarray(Image.open(path)) * 0.3).astype(np.uint8)).save(path)
    small = ["--image-size", SIDE, "--width", 4, "--depth", 2, "--batch-size", 8, "--precision", "fp32"]
    here("segmenter", *small, "--epochs", 2, "--data", data, "--out", folder / "run")
    return folder / "run", data


def test_the_script_audits_a_segmenter(segmenter, tmp_path):
    run, data = segmenter
    out = tmp_path / "out"
    out.mkdir()
    kept = {"key": "of another question", "proof 0": ["used", None, None, [], [], ""]}
    (out / ".audit.json").write_text(json.dumps(kept))
    as_process("audit", run, "--data", data, "--out", out)
    assert not (out / ".audit.json").exists()
    found = read(out / "audit.json")
    model = checkpoint.load(run)
    parts, _ = parts_of(model, data, "test")
    counts, *_ = importlib.import_module("measure").pixel_counts(model, *read_photos(parts, "test", model))
    assert found["iou"]["value"] == pytest.approx(segmentation_scores(counts.sum(1))["iou"])
    assert found["n"] == len(counts)
    (light,) = (each for each in found["tried"] if each["kind"] == "light")
    assert light["class_name"] is None
    dark = {f"images/{path.name}" for path in sorted((data / "images").iterdir())[::4]}
    assert set(light["pictures"]) <= dark or not set(light["pictures"]) & dark
    for each in found["tried"]:
        assert each["added"]["low"] <= each["added"]["value"] <= each["added"]["high"]
    assert (out / "audit/mistakes.html").read_text().count("<figure>") == found["n"]
    refused = as_process("audit", run, "--data", data, "--clean", tmp_path / "clean", "--out", out, check=False)
    assert refused.returncode == 1
    assert "classifier" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "clean").exists()


# --- stopped and continued --------------------------------------------------------------------------------------------

KILLED = """
import os, runpy, sys
rename, last = os.replace, sys.argv[1]
def counted(source, target, **options):
    rename(source, target, **options)
    if os.path.basename(str(target)) == last:
        os.kill(os.getpid(), 9)
os.replace = counted
sys.path.insert(0, {train!r})
sys.argv = sys.argv[2:]
runpy.run_path({train!r} + "/audit.py", run_name="__main__")
""".format(train=str(ROOT / "train"))


def audit(*words: object, after: str = "") -> int:
    """The exit status of an audit that is killed as soon as a file of this name was put into its place."""
    command = [sys.executable, "-c", KILLED, after, "audit.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=False, timeout=300).returncode


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "test_reads.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_audit_that_is_killed_continues_and_ends_with_the_same_files(tmp_path):
    data, out, clean = tmp_path / "data", tmp_path / "out", tmp_path / "clean"
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        for i in range(80):
            pixels = rng.integers(0, 200, (8, 8, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            if name == "b":
                pixels[2:9, 3:11] = (230, 30, 30)
            Image.fromarray(pixels).save(data / name / f"{i}.png")
    here("classifier", *SMALL_CLASSIFIER, "--augment", "none", "--data", data, "--out", tmp_path / "run")
    words = [tmp_path / "run", "--data", data, "--out"]
    assert audit(*words, tmp_path / "whole", "--clean", tmp_path / "clean-whole") == 0
    wanted, painted = contents(tmp_path / "whole"), contents(tmp_path / "clean-whole")
    assert set(wanted) >= {"audit.json", "audit/mistakes.html", "README.md"}
    words += [out, "--clean", clean]
    assert audit(*words, after=".audit.json") == -signal.SIGKILL  # the first proof is there
    state = out / ".audit.json"
    begun = json.loads(state.read_text())
    assert "proof 0" in begun
    assert audit(*words, after="audit.json") == -signal.SIGKILL
    assert json.loads(state.read_text())["proof 0"] == begun["proof 0"]
    assert audit(*words, after="clean") == -signal.SIGKILL
    assert clean.is_dir()
    assert audit(*words) == 0
    assert contents(out) == wanted
    assert contents(clean) == painted
    assert audit(*words) == 1  # the clean data are of a command that has ended
