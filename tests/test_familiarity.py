"""Photos of none of a model's classes: how familiar they are, by statistics that stand in the model's folder."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration import calibrate
from measure import add_unknown
from PIL import Image
from runs import SMALL_CLASSIFIER, colours, here, last_words
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError, card
from cvlab.data.evaluation import foreign_views, parts_of, read_views
from cvlab.explain import default_stage
from cvlab.models import Model, build
from cvlab.page.evidence import predict_photo
from cvlab.page.many import explain_picture, to_csv
from cvlab.page.models import Models
from cvlab.page.panels import draw
from cvlab.page.question import Question
from cvlab.page.visit import Visits
from cvlab.page.words import said
from cvlab.transforms import open_image, view
from cvlab.trust import familiarity
from cvlab.trust.familiarity import features, fit_statistics, foreignness, nearest

KEPT = {"weight", "bias", "mean", "scale", "directions", "rows", "labels", "val"}


def green(folder: Path, count: int = 40) -> Path:
    """Pictures of neither class of `colours`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
        pixels[..., 1] += 100
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def small(**arguments: object) -> Model:
    torch.manual_seed(0)
    return build("convnet", ["blue", "red"], 32, {"widths": [8, 16], **arguments}).eval()


def test_what_lies_outside_the_own_directions_by_hand() -> None:
    basis = torch.eye(3)[:, :2]
    found = torch.tensor([[2.0, 0, 0], [3, 4, 0], [0, 0, 5], [1, 0, 1]])
    assert foreignness({"basis": basis}, found).tolist() == pytest.approx([0, 0, 1, 1 - 0.5**0.5], abs=1e-6)


def test_familiarity_is_the_share_of_val_that_is_as_foreign() -> None:
    """The foreignness is the mean of red at the first stage, from 4 pictures of val; of equal ones both count."""
    model = small()
    images = torch.rand(4, 3, 32, 32)
    rows = features(model, images)
    weight = torch.zeros(rows.shape[1])
    weight[8] = 1  # the first mean: 8 deviations stand before it
    order = rows[:, 8].argsort()
    model.statistics = {"weight": weight, "bias": torch.tensor([0.25]), "val": rows[:, 8] + 0.25}
    assert familiarity(model, images[order]).tolist() == [1, 0.75, 0.5, 0.25]
    model.statistics["val"] = model.statistics["val"] - 10
    assert familiarity(model, images).tolist() == [0, 0, 0, 0]


def test_features_are_mean_and_deviation_of_each_channel() -> None:
    model, images = small(), torch.rand(2, 3, 32, 32)
    seen = []
    for stage in model.stages.values():
        stage.module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(images)
    expected = [f(maps.numpy(), axis=(2, 3)) for maps in seen for f in (np.std, np.mean)]
    np.testing.assert_allclose(features(model, images).numpy(), np.concatenate(expected, 1), rtol=1e-4, atol=1e-5)


def test_the_class_for_rejecting_is_scikit_learns() -> None:
    model, generator = small(), torch.Generator().manual_seed(0)
    own, val, others = (torch.randint(high, (20, 3, 32, 32), generator=generator).byte() for high in (200, 200, 256))
    found = fit_statistics(model, own, torch.zeros(len(own)), val, others)
    rows = [features(model, views).numpy() for views in (own, others)]
    oracle = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
    scaled = make_pipeline(StandardScaler().fit(rows[0]), oracle)
    oracle.fit(scaled[0].transform(np.concatenate(rows)), [0] * 20 + [1] * 20)
    expected = scaled.decision_function(features(model, val).numpy())
    np.testing.assert_allclose(found["val"].numpy(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("timm", {"architecture": "test_efficientnet"}),
        ("timm", {"architecture": "test_vit"}),
        ("timm_head", {"architecture": "test_resnet", "hidden": [8]}),
        ("timm_head", {"architecture": "test_resnet", "hidden": [8], "pool": False}),
    ],
)
def test_of_a_network_of_timm_the_own_directions_are_kept(network: str, arguments: dict) -> None:
    """Eight directions hold eight pictures, and nothing of them lies outside."""
    torch.manual_seed(0)
    size = 160 if arguments["architecture"] == "test_vit" else 32
    model = build(network, ["a", "b"], size, arguments).eval()
    views = torch.randint(256, (8, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    found = fit_statistics(model, views, torch.arange(len(views)) % 2, views, None)
    assert found["basis"].shape[0] == features(model, views / 255).shape[1]
    assert found["val"].abs().max() < 1e-2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model of red and blue that was trained beside green pictures; its data; other green pictures."""
    folder = tmp_path_factory.mktemp("familiarity")
    data, others = colours(folder / "colours", each=100), green(folder / "green")
    here("classifier", *SMALL_CLASSIFIER, "--data", data, "--out", folder / "run", "--others", others)
    return folder / "run", data, others


def test_a_training_beside_others_knows_them(run: tuple[Path, Path, Path]) -> None:
    out, data, others = run
    model = checkpoint.load(out)
    assert model.class_names == ["blue", "red"]
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 2)
    parts, _ = parts_of(model, data, "test")
    for part, most in (("val", 0.05), ("test", 0.3)):
        refused = familiarity(model, read_views(parts, part, model)[0] / 255) < 0.05
        assert refused.float().mean() <= most
    assert (familiarity(model, foreign_views(others, model) / 255) < 0.05).all()
    assert (out / "familiarity.safetensors").stat().st_size < 300_000


def test_a_report_and_the_card_tell_of_the_unknown(run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out, data, others = run
    model = checkpoint.load(out)
    views, _ = read_views(parts_of(model, data, "test")[0], "test", model)
    own = tmp_path / "like own"
    own.mkdir()
    for i, pixels in enumerate(views):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(own / f"{i}.png")
    found, pictures = {}, {}
    add_unknown(found, pictures, model, views, [others, own])
    assert found["refused green"]["value"] == 1
    assert found["refused green"]["roc_area"] == 1
    assert found["refused like own"]["roc_area"] == pytest.approx(0.5, abs=0.05)
    assert [*found] == ["refused own", "refused green", "refused like own"]
    assert pictures["unknown.png"]().size[0] > 100
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps({"part": "test", "n": 4} | found))
    card.write(tmp_path)
    assert "photos of none of its classes: like own." in (tmp_path / "README.md").read_text()


def test_without_statistics_nothing_can_be_told(run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out, data, _ = run
    with pytest.raises(ValueError, match="no statistics"):
        familiarity(small(), torch.rand(1, 3, 32, 32))
    other = small(depth=1, widths=[4])
    other.statistics = checkpoint.load(out).statistics
    with pytest.raises(ValueError, match="no statistics"):
        familiarity(other, torch.rand(1, 3, 32, 32))
    checkpoint.save(checkpoint.load(out), tmp_path)
    assert (tmp_path / "familiarity.safetensors").is_file()
    calibrate(tmp_path, parts_of(checkpoint.load(out), data, "val")[0])  # no others are given this time
    assert checkpoint.load(tmp_path).statistics.keys() == KEPT
    checkpoint.save(small(), tmp_path)  # another model in the same place
    assert checkpoint.load(tmp_path).statistics is None


@pytest.mark.parametrize("tensors", [{"val": torch.zeros(100_000)}, {"val": torch.tensor([float("nan")])}])
def test_statistics_that_are_too_large_or_no_numbers_are_refused(tmp_path: Path, tensors: dict) -> None:
    checkpoint.save(small(), tmp_path)
    save_file(tensors, tmp_path / "familiarity.safetensors")
    with pytest.raises(CheckpointError, match=r"familiarity\.safetensors"):
        checkpoint.load(tmp_path)


def test_a_folder_of_others_that_is_not_there_is_found_out_at_once(tmp_path: Path) -> None:
    words = ["--data", tmp_path, "--out", tmp_path / "run", "--others", tmp_path / "nowhere"]
    assert "nowhere" in last_words("classifier", *words)
    assert not (tmp_path / "run").exists()


def test_the_page_says_what_is_unlike_its_photos(run: tuple[Path, Path, Path]) -> None:
    out, data, others = run
    model, photo, own = checkpoint.load(out), others / "0.png", next(iter(sorted((data / "red").iterdir())))
    assert predict_photo(open_image(photo), model).familiar == 0
    assert predict_photo(open_image(own), small()).familiar is None
    stage = default_stage(model)
    rows = [explain_picture(model, each, Question(stage=stage), i)[0] for i, each in enumerate((photo, own))]
    assert [row.familiar for row in rows] == pytest.approx([0, familiarity(model, view(open_image(own), model)).item()])
    header, first, _ = csv.reader(io.StringIO(to_csv(rows)))
    assert dict(zip(header, first, strict=True))["familiar"] == "0.0"
    visits = Visits(Models({"colours": str(out)}))
    foreign, known = (said(visits.ask(str(path), "colours", Question()))[0] for path in (photo, own))
    assert foreign.startswith("Unlike anything it was trained on. Nearest: ")
    assert foreign.split("Nearest: ")[1].split(",")[0] in model.class_names  # which can still be seen
    assert ("Unlike" in known) == (rows[1].familiar < 0.05)


def test_the_nearest_pictures_of_training_by_hand() -> None:
    """Along the first two axes: the third is not kept, lengths do not count."""
    model = small()
    model.statistics = {
        "basis": torch.eye(3)[:, :2].half(),
        "rows": torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]).half(),
    }
    model.statistics["labels"] = torch.tensor([0, 1, 1], dtype=torch.int32)
    found = nearest(model, torch.empty(1), torch.tensor([[0.0, 2, 9]]), most=2)
    assert [name for name, _ in found] == ["red", "red"]
    assert [likeness for _, likeness in found] == pytest.approx([1, 0.8], abs=1e-3)


@pytest.mark.parametrize("with_others", [True, False])
def test_a_picture_of_training_is_nearest_to_itself(with_others: bool) -> None:
    torch.manual_seed(0)
    model = small()
    if not with_others:
        model = build("timm", ["blue", "red"], 32, {"architecture": "test_resnet"}).eval()
    own, foreign = torch.randint(256, (2, 30, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(30) % 2
    model.statistics = fit_statistics(model, own, labels, own, foreign if with_others else None)
    for i in range(5):
        best, *_ = nearest(model, own[i, None] / 255)
        assert best == (model.class_names[labels[i]], pytest.approx(1, abs=2e-3))
    model.statistics["labels"] += 7  # of another model
    with pytest.raises(ValueError, match="--calibrate"):
        nearest(model, own[:1] / 255)


def test_what_is_kept_of_many_pictures_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(sys.modules["cvlab.trust.familiarity"], "MOST_BYTES", 5000)  # a function has its name
    kept = fit_statistics(small(), views, torch.zeros(60), views[:5], views)
    assert 0 < len(kept["rows"]) < 60
    assert sum(each.nbytes for each in kept.values()) <= 5000 + kept["val"].nbytes


def test_the_classes_of_the_nearest_pictures_of_training_are_named(tmp_path: Path) -> None:
    """The nearest picture to one of training is that picture."""
    data, out = colours(tmp_path / "data", 40), tmp_path / "run"
    words = [*SMALL_CLASSIFIER, "--data", data, "--out", out, "--others", green(tmp_path / "others")]
    here("classifier", *words)
    parts, _ = parts_of(checkpoint.load(out), data, "val")
    photo = parts.samples["train"][0][0]
    answer = Visits(Models({"run": str(out)})).ask(str(photo), "run", Question())
    (name, likeness), *_ = answer.prediction.alike
    assert (name, likeness) == (photo.parent.name, pytest.approx(1, abs=2e-3))
    assert f"Most like it in training (cosine similarity): “{name}” (1.00)" in draw(answer, ["facts"])["facts"]
