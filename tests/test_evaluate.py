"""train/evaluate.py: where its figures go, and that the published ones stay those of the model's own test part."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import noise

from cvlab import checkpoint
from cvlab.data.evaluation import is_own_test_part, parts_of, read_views
from cvlab.data.parts import classification_parts
from cvlab.models import build

ROOT = Path(__file__).resolve().parents[1]


def save_pictures(folder: Path, seed: int) -> Path:
    """20 dark and 20 bright pictures."""
    rng = np.random.default_rng(seed)
    for name, darkest in (("dark", 0), ("bright", 130)):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(darkest, darkest + 120, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures of the same classes, in a folder of the same name."""
    return save_pictures(tmp_path_factory.mktemp("others") / "pictures", 1)


@pytest.fixture
def model(data: Path, tmp_path: Path) -> Path:
    """The folder of a model that was trained on the data, as far as its config.json says."""
    torch.manual_seed(0)
    parts = classification_parts(data)
    folder = tmp_path / "model"
    checkpoint.save(build("convnet", parts.class_names, 16, {"widths": [4, 8]}), folder, data=parts.facts)
    return folder


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs the script in this process, which has its imports already."""
    monkeypatch.syspath_prepend(str(ROOT / "train"))

    def run_it(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train/evaluate.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "train" / "evaluate.py"), run_name="__main__")

    return run_it


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_other_parts_and_other_data_leave_the_published_figures(
    model: Path, data: Path, others: Path, evaluate: Callable
) -> None:
    evaluate(model, "--data", data)
    published = {name: (model / name).read_bytes() for name in ("metrics.json", "README.md", "report/README.md")}
    assert read(model / "metrics.json")["part"] == "test"
    assert read(model / "metrics.json")["n"] == 6
    evaluate(model, "--data", data, "--part", "val")
    evaluate(model, "--data", others)
    assert {name: (model / name).read_bytes() for name in published} == published
    assert read(model / "report" / "val" / "metrics.json")["part"] == "val"
    assert read(model / "report" / "pictures-test" / "metrics.json")["n"] == 6
    for folder in ("", "val", "pictures-test"):
        assert Image.open(model / "report" / folder / "confusion_matrix.png").width > 100
        assert Image.open(model / "report" / folder / "photos" / "grad_cam.png").width > 100
    reads = [json.loads(line) for line in (model / "test_reads.jsonl").read_text().splitlines()]
    assert [Path(line["command"][3]) for line in reads] == [data, others]  # val is no reading of test
    pictures = [read(each / "metrics.json")["pictures"] for each in (model, model / "report" / "pictures-test")]
    recorded = checkpoint.load(model).config["data"]["fingerprints"]["test"]
    assert sorted(pictures[0]) == recorded
    assert not pictures[0].keys() & pictures[1].keys()
    assert sum(pictures[0].values()) / 6 == read(model / "metrics.json")["accuracy"]["value"]


def test_a_report_elsewhere_is_that_of_the_part_that_was_asked_for(
    model: Path, data: Path, tmp_path: Path, evaluate: Callable
) -> None:
    evaluate(model, "--data", data, "--part", "all", "--out", tmp_path / "report")
    assert read(tmp_path / "report" / "metrics.json")["n"] == 40
    assert "28 of these pictures were trained on" in (tmp_path / "report" / "report" / "README.md").read_text()
    assert not (model / "metrics.json").exists()


def test_a_model_of_the_hub_is_not_shadowed_by_its_report(model: Path, data: Path, tmp_path: Path) -> None:
    """The model is in the cache of the Hub, which cannot be reached."""
    cached, commit = tmp_path / "hub" / "models--user--name", "a" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    model.rename(cached / "snapshots" / commit)
    here = tmp_path / "here"
    here.mkdir()
    command = [sys.executable, str(ROOT / "train" / "evaluate.py"), "user/name", "--data", str(data)]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for _ in range(2):  # the second time the name is still the Hub's
        answer = subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=300, check=False)
        assert answer.returncode == 0, answer.stderr[-2000:]
    assert [path.name for path in here.iterdir()] == ["runs"]
    assert read(here / "runs" / "hub" / "user" / "name" / "metrics.json")["n"] == 6


def test_the_test_part_of_other_data_is_not_the_model_s_own(model: Path, data: Path, others: Path) -> None:
    loaded = checkpoint.load(model)
    assert is_own_test_part(loaded, parts_of(loaded, data, "test")[0])
    assert not is_own_test_part(loaded, parts_of(loaded, others, "test")[0])


def test_numbers_are_written_before_pictures_are_drawn(model: Path, data: Path, evaluate: Callable) -> None:
    """A folder stands where the first picture belongs, so that it cannot be written."""
    (model / "report" / "confusion_matrix.png").mkdir(parents=True)
    with pytest.raises(SystemExit):
        evaluate(model, "--data", data)
    found = read(model / "metrics.json")
    assert found["n"] == 6
    assert "accuracy" in (model / "report" / "README.md").read_text()
    assert "accuracy" in (model / "README.md").read_text()  # the card
    loaded = checkpoint.load(model)
    views, labels = read_views(parts_of(loaded, data, "test")[0], "test", loaded)
    with torch.no_grad():
        loss = F.cross_entropy(loaded(views / 255), torch.tensor(labels)).item()
    assert found["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert found["loss"]["low"] <= loss <= found["loss"]["high"]


def test_trust_is_measured_once_and_kept_where_the_verdict_and_the_card_read_it(
    model: Path, data: Path, evaluate: Callable
) -> None:
    trust = model / "trust.json"
    evaluate(model, "--data", data, "--trust", 2)
    two = read(trust)["maps"]
    trust.write_text(json.dumps({"weights": read(trust)["weights"], "maps": two[:1]}))  # as it was when it was stopped
    evaluate(model, "--data", data, "--trust", 3)
    found = read(trust)
    assert len(two) == 2
    assert found["maps"][:2] == two
    assert found["pictures"] == len(found["maps"]) == 3
    assert {sum(counts.values()) for counts in found["stages"].values()} <= {0, 1, 2, 3}  # blank maps are left out
    assert checkpoint.load(model).config["limits"] == found["limits"]
    card = (model / "README.md").read_text("utf-8")
    assert f"Recommended stage: {found['recommended']}" in card
    first = found["maps"][0]
    found["weights"] = "of another model"
    trust.write_text(json.dumps(found | {"maps": [{"stage1": [1, 1]}]}))
    evaluate(model, "--data", data, "--trust", 1)
    assert read(trust)["maps"] == [first]


def test_of_many_classes_the_most_confused_are_drawn_too(tmp_path: Path, evaluate: Callable) -> None:
    photos = noise(tmp_path / "photos", [f"class {i}" for i in range(41)], each=1)
    checkpoint.save(build("convnet", sorted(path.name for path in photos.iterdir()), 16, {"widths": [4, 8]}), tmp_path)
    evaluate(tmp_path, "--data", photos, "--part", "all", "--explain", "ten", "--out", tmp_path / "out")
    assert read(tmp_path / "out" / "metrics.json")["n"] == 41
    drawn = {path.name for path in (tmp_path / "out" / "report").glob("*.png")}
    assert drawn == {"confusion_matrix.png", "confused_pairs.png", "reliability.png"}
