"""The audit: planted marks are found where they are, and what a hand-made model makes of them is measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import here
from scipy.stats import ttest_ind

from cvlab.audit import fixed, patches, whole
from cvlab.audit.data import facts_of, odd_labels, telling, weak_groups
from cvlab.audit.mistakes import mistakes_page
from cvlab.audit.prove import prove, without
from cvlab.models import Model, build
from cvlab.render import to_picture
from cvlab.transforms import to_float, to_uint8

ROOT = Path(__file__).resolve().parents[1]
SIDE, EACH = 32, 80  # pixels; pictures of each of three classes
CORNER = torch.zeros(SIDE, SIDE, dtype=torch.bool)
CORNER[2:9, 3:11] = True


def blobs(seed: int, count: int = 3 * EACH) -> torch.Tensor:
    """Smooth random colours, (count, 3, SIDE, SIDE) in [0, 1], with a little noise."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draw)
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
    return (smooth + 0.02 * torch.randn(smooth.shape, generator=draw)).clamp(0, 1)


def as_views(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def with_corner(images: torch.Tensor, opacity: float) -> torch.Tensor:
    """A red rectangle of some opacity."""
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    return torch.where(CORNER, (1 - opacity) * images + opacity * red, images)


@pytest.fixture(params=[1.0, 0.5], ids=["opaque", "half-transparent"])
def planted(request):
    """Views, labels, the same pictures bare, and which have the mark: 0.8 of class 1, 0.1 of the others."""
    bare, labels = blobs(0), torch.arange(3).repeat(EACH)
    share = torch.where(labels == 1, 0.8, 0.1)
    has = torch.rand(len(bare), generator=torch.Generator().manual_seed(1)) < share
    images = torch.where(has.view(-1, 1, 1, 1), with_corner(bare, request.param), bare)
    return as_views(images), labels, bare, has, request.param


def test_a_fixed_mark_is_found_with_its_class_place_and_pictures(planted):
    views, labels, _, has, _ = planted
    (mark,) = fixed.propose(views, labels, 3)
    assert mark.class_idx == 1
    assert (mark.region & CORNER).sum() == CORNER.sum()
    assert mark.region.sum() < 2 * CORNER.sum()
    assert mark.where == "at the upper left"
    assert (mark.has(views) == has).float().mean() > 0.98


def test_the_matte_of_a_fixed_mark_draws_it_in_and_takes_it_off(planted):
    views, labels, _, _, opacity = planted
    (mark,) = fixed.propose(views, labels, 3)
    assert mark.keep[:, 4:8, 5:9].mean().item() == pytest.approx(1 - opacity, abs=0.15)
    others = blobs(5, 40)
    drawn = with_corner(others, opacity)
    assert (mark.added(others) - drawn).abs()[:, :, CORNER].mean() < 0.05
    taken = without(mark, drawn)
    assert (taken - others).abs()[:, :, CORNER].mean() < (0.1 if opacity < 1 else 0.2)
    assert torch.equal(taken[:, :, SIDE // 2 :], drawn[:, :, SIDE // 2 :])


def test_the_mark_of_other_classes_is_not_blamed_on_the_one_without_it():
    images, labels = blobs(2), torch.arange(3).repeat(EACH)
    marked = torch.where((labels != 0).view(-1, 1, 1, 1), with_corner(images, 1.0), images)
    assert all(mark.class_idx != 0 for mark in fixed.propose(as_views(marked), labels, 3))


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_proposed_without_a_mark(seed):
    views, labels = as_views(blobs(seed + 10)), torch.arange(3).repeat(EACH)
    assert not list(fixed.propose(views, labels, 3))
    assert not list(patches.propose(views, labels, 3))


def cross() -> torch.Tensor:
    """A sticker: a yellow square with a blue cross, (3, 15, 15)."""
    pixels = torch.tensor([0.9, 0.8, 0.1]).view(3, 1, 1).expand(3, 15, 15).clone()
    pixels[:, 6:9, 2:13] = pixels[:, 2:13, 6:9] = torch.tensor([0.1, 0.1, 0.7]).view(3, 1, 1)
    return pixels


def stuck(images: torch.Tensor, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """The sticker at random places, and the corners of these."""
    corners = np.random.default_rng(seed).integers(0, SIDE - 15, (len(images), 2))
    images = images.clone()
    for image, (y, x) in zip(images, corners, strict=True):
        image[:, y : y + 15, x : x + 15] = cross()
    return images, corners


def test_a_mark_at_random_places_is_found_and_hidden_where_it_is():
    bare, labels = blobs(3), torch.arange(3).repeat(EACH)
    images, corners = stuck(bare, 0)
    has = (labels == 2) & (torch.arange(len(labels)) % 4 > 0)
    images = torch.where(has.view(-1, 1, 1, 1), images, bare)
    (mark,) = patches.propose(as_views(images), labels, 3)
    assert mark.class_idx == 2
    assert (mark.has(as_views(images)) == has).float().mean() > 0.95
    _, hidden = mark.removed(images[has])
    for square, (y, x) in zip(hidden[:, 0], corners[has.numpy()], strict=True):
        assert square[y + 2 : y + 13, x + 2 : x + 13].float().mean() > 0.9
        assert square.sum() <= (patches.SIDE + 2 * patches.MARGIN) ** 2
    drawn = mark.added(bare[:20])
    assert ((drawn != bare[:20]).any(1).flatten(1).sum(1) <= patches.SIDE**2).all()
    assert mark.has(as_views(drawn)).all()


def test_likeness_is_the_correlation_with_the_pixels_at_a_place():
    pixels, images = torch.rand(3, 13, 13), torch.rand(2, 3, 40, 40)
    mark = patches.Patch(0, 1.0, pixels, pixels)
    found = mark._likeness(images)
    assert found.shape == (2, 28, 28)
    for i, y, x in ((0, 0, 0), (1, 27, 5), (0, 11, 27)):
        here = images[i, :, y + 2 : y + 11, x + 2 : x + 11].flatten().numpy()
        assert found[i, y, x].item() == pytest.approx(
            np.corrcoef(here, pixels[:, 2:11, 2:11].flatten())[0, 1], abs=1e-3
        )


class Reader(Model):
    """Two classes; class 1 gets `weight` times the mean red of the corner less its mean green."""

    task = "classification"

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.class_names, self.image_size, self.weight = ["a", "b"], SIDE, weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green = images[:, 0, CORNER].mean(1), images[:, 1, CORNER].mean(1)
        return torch.stack([torch.zeros(len(images)), self.weight * (red - green)], 1)


@pytest.mark.parametrize(
    ("weight", "level"), [(6.0, "used"), (0.0, "there but not used"), (-6.0, "there but not used")]
)
def test_a_mark_is_used_if_taking_it_out_or_putting_it_in_moves_the_answer(planted, weight, level):
    views, labels, _, _, opacity = planted
    (mark,) = fixed.propose(views, labels, 3)
    bare, model = blobs(7), Reader(weight)
    own = labels == 1
    held = as_views(torch.where(own.view(-1, 1, 1, 1), with_corner(bare, opacity), bare))
    proof = prove(model, mark, held, labels, tried=2)
    assert proof.level == level
    assert proof.marked == own.nonzero().flatten().tolist()
    true = model(with_corner(bare, opacity)).softmax(1)[:, 1] - model(bare).softmax(1)[:, 1]
    assert proof.added["value"] == pytest.approx(true[~own].mean().item(), abs=0.03)
    if opacity < 1:  # what an opaque mark hid cannot be known
        assert proof.removed["value"] == pytest.approx(true[own].mean().item(), abs=0.05)


def test_the_more_marks_are_tried_the_wider_are_the_bounds(planted):
    views, labels, *_ = planted
    (mark,) = fixed.propose(views, labels, 3)
    one, ten = (prove(Reader(6.0), mark, views, labels, tried).added for tried in (1, 10))
    assert one["value"] == ten["value"]
    # z of 0.975 and of 0.9975
    assert (ten["high"] - ten["value"]) / (one["high"] - one["value"]) == pytest.approx(2.8070 / 1.9600, abs=1e-3)


def test_swapped_labels_come_first():
    draw = torch.Generator().manual_seed(0)
    centres, labels = 3 * torch.randn(4, 8, generator=draw), torch.arange(4).repeat(100)
    features = centres[labels] + torch.randn(400, 8, generator=draw)
    swapped = torch.randperm(400, generator=draw)[:20].tolist()
    given = labels.clone()
    given[swapped] = (given[swapped] + 1) % 4
    found = odd_labels(features, given)
    first = found[:20]
    assert len({row for row, _ in first} & set(swapped)) >= 18
    right = [likely == labels[row] for row, likely in first if row in swapped]
    assert sum(right) >= 0.8 * len(right)


def test_classes_of_few_pictures_are_not_doubted():
    assert odd_labels(torch.rand(9, 4), [0] * 6 + [1] * 3) == []


def test_light_that_differs_in_all_tones_is_found_and_put_into_others():
    grey = blobs(20).mean(1, keepdim=True)
    images, labels = (0.9 * grey + 0.1 * blobs(20)).clamp(0.1, 0.8), torch.arange(3).repeat(EACH)
    gains = torch.tensor([1.2, 1.0, 0.8]).view(3, 1, 1)
    warm = torch.where((labels == 1).view(-1, 1, 1, 1), images * gains, images)
    found = {mark.class_idx: mark for mark in whole.propose(as_views(warm), labels, 3, {}) if mark.kind == "light"}
    drawn = found[1].added(images[:5])
    assert found[1].strength == max(mark.strength for mark in found.values())
    ratio = (drawn / images[:5]).mean((0, 2, 3))
    assert 1.08 < ratio[0] / ratio[1] < 1.25  # the least of four tones
    assert 0.75 < ratio[2] / ratio[1] < 0.92


def test_blurred_pictures_are_found_and_others_are_blurred_as_much():
    from torchvision.transforms.functional import gaussian_blur

    images, labels = torch.rand(3 * EACH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), torch.arange(3)
    labels = labels.repeat(EACH)
    views = torch.where((labels == 2).view(-1, 1, 1, 1), gaussian_blur(images, 7, 1.0), images)
    (mark,) = (mark for mark in whole.propose(as_views(views), labels, 3, {}) if mark.kind == "sharpness")
    assert (mark.class_idx, mark.sigma) == (2, 1.0)
    assert (mark.added(images[:3]) - gaussian_blur(images[:3], 7, 1.0)).abs().max() < 1e-6


class Warmth(Reader):
    """Class 1 gets `weight` times how much redder than blue the whole picture is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, _, blue = images.mean((2, 3)).T
        return torch.stack([torch.zeros(len(images)), self.weight * (red - blue)], 1)


@pytest.mark.parametrize(("weight", "level"), [(20.0, "used"), (0.0, "there but not used")])
def test_light_is_proved_by_what_it_changes_beyond_what_another_class_gains(weight, level):
    images, labels = blobs(21).clamp(0.1, 0.8), torch.arange(2).repeat(3 * EACH // 2)
    gains = torch.tensor([1.25, 1.0, 0.75]).view(3, 1, 1)
    warm = as_views(torch.where((labels == 1).view(-1, 1, 1, 1), images * gains, images))
    mark = whole.WholePicture(1, 0.2, "light", gains)
    model = Warmth(weight)
    proof = prove(model, mark, warm, labels, tried=1)
    assert (proof.level, proof.removed) == (level, None)
    others = warm[labels == 0] / 255
    true = model((others * gains).clamp(0, 1)).softmax(1)[:, 1] - model(others).softmax(1)[:, 1]
    assert proof.added["value"] == pytest.approx(true.mean().item(), abs=1e-5)


def test_brightness_tells_the_classes_where_it_does_and_nothing_where_nothing_does():
    images, labels = blobs(22), torch.arange(3).repeat(EACH)
    same = telling(facts_of(as_views(images)), labels)
    assert max(same.values()) < 0.5  # chance is 1/3
    darker = torch.where((labels == 1).view(-1, 1, 1, 1), images * 0.3, images)
    assert telling(facts_of(as_views(darker)), labels)["brightness"] > 0.6


def saved(folder: Path, images: torch.Tensor, qualities: list[int | None]) -> list[tuple[Path, int]]:
    """The pictures as JPEG files of these qualities, as PNG where it is None."""
    folder.mkdir()
    for i, (image, quality) in enumerate(zip(images, qualities, strict=True)):
        kind = {"format": "JPEG", "quality": quality} if quality else {"format": "PNG"}
        to_picture(image).save(folder / f"{i:03}", **kind)
    return [(path, 0) for path in sorted(folder.iterdir())]


def test_the_facts_of_files_are_those_they_were_saved_with(tmp_path):
    images = blobs(24, 6)
    facts = facts_of(as_views(images), saved(tmp_path / "x", images, [15, 30, 50, 75, 95, None]))
    assert facts["JPEG quality"].tolist() == pytest.approx([15, 30, 50, 75, 95, 100], abs=1)
    assert set(facts["width"].tolist()) == {SIDE}
    size = (tmp_path / "x" / "000").stat().st_size
    assert facts["bytes by pixel"][0].item() == pytest.approx(size / SIDE**2)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert "width" not in telling(facts, labels)  # it is the same in all
    assert "JPEG quality" in telling(facts, labels)


class Blocky(Reader):
    """Class 1 gets `weight` times how much the steps at the edges of JPEG's blocks exceed those within."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        steps = images.diff(dim=3).abs().mean((1, 2))
        at_edges, within = steps[:, 7::8].mean(1), steps[:, 3::8].mean(1)
        return torch.stack([torch.zeros(len(images)), self.weight * (at_edges - within)], 1)


@pytest.mark.parametrize(("weight", "level"), [(300.0, "used"), (0.0, "there but not used")])
def test_the_compression_of_a_class_is_found_in_its_files_and_proved(tmp_path, weight, level):
    images, labels = blobs(25), torch.arange(3).repeat(EACH)
    facts = facts_of(as_views(images), saved(tmp_path / "x", images, [10 if i == 1 else 90 for i in labels]))
    (mark,) = (each for each in whole.propose(as_views(images), labels, 3, facts) if each.kind == "compression")
    assert (mark.class_idx, mark.scale) == (1, 1.0)
    assert mark.quality == pytest.approx(10, abs=1)
    proof = prove(Blocky(weight), mark, as_views(images), (labels == 1).long(), tried=1)
    assert (proof.level, proof.removed) == (level, None)
    bare, file = images[labels != 1], tmp_path / "one.jpg"
    changed = []
    for image in bare:
        to_picture(image).save(file, quality=mark.quality)
        changed.append(to_float(to_uint8(Image.open(file))))
    model = Blocky(weight)
    true = model(torch.stack(changed)).softmax(1)[:, 1] - model(bare).softmax(1)[:, 1]
    assert proof.added["value"] == pytest.approx(true.mean().item(), abs=0.05)


def test_a_group_that_fails_more_is_found_on_val_and_measured_on_test():
    draw = torch.Generator().manual_seed(0)
    facts, errors = {}, {}
    for part, count in (("val", 300), ("test", 400)):
        dark, other = torch.rand(2, count, generator=draw)
        facts[part] = {"brightness": dark, "the same": dark + 0.01 * other, "other": other, "constant": 0 * dark}
        share = torch.where(dark < 0.2, 0.6, 0.1)
        errors[part] = (torch.rand(count, generator=draw) < share).double()
    (found,) = weak_groups(facts, errors)
    assert found["fact"] in ("brightness", "the same")
    assert (found["side"], found["bound"]) == ("at most", pytest.approx(0.2, abs=0.05))
    inside = facts["test"][found["fact"]] <= found["bound"]
    own, rest = errors["test"][inside], errors["test"][~inside]
    assert (found["n"], found["error"], found["rest"]) == (len(own), own.mean(), rest.mean())
    bounds = ttest_ind(own, rest, equal_var=False).confidence_interval(0.95)
    assert (found["more"]["low"], found["more"]["high"]) == pytest.approx((bounds.low, bounds.high), abs=0.01)
    assert found["more"]["value"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("seed", range(20, 25))
def test_what_only_val_shows_is_no_group(seed):
    draw = torch.Generator().manual_seed(seed)
    facts = {part: {str(i): torch.rand(200, generator=draw) for i in range(10)} for part in ("val", "test")}
    errors = {part: (torch.rand(200, generator=draw) < 0.2).double() for part in facts}
    errors["val"][facts["val"]["3"] > 0.8] = 1.0
    assert weak_groups(facts, errors) == []


def test_the_page_of_mistakes_shows_the_surest_first_and_renders_no_strangers_text():
    torch.manual_seed(0)
    model = build("convnet", ["<b>a</b>", "b & c"], SIDE, {"widths": [4, 8]}).eval()
    views, labels = as_views(blobs(23, 6)), torch.tensor([0, 0, 0, 1, 1, 1])
    logits = torch.tensor([[2.0, 0], [0, 1.0], [0, 3.0], [0, 2.0], [0, 1.0], [0, 4.0]])
    files = [f"<i>{i}.png" for i in range(6)]
    like = [(views[0], f"train{i}", 1) for i in range(6)]
    page = mistakes_page(model, "T <x>", views, labels, logits, files, like)
    assert not any(raw in page for raw in ("<b>", "<i>", "<x>", "b & c"))
    order = [page.index(f"&lt;i&gt;{i}.png:") for i in (2, 1, 4, 3, 5, 0)]  # sure mistakes; then doubtful right ones
    assert order == sorted(order)
    assert page.count('<a href="#0-1">2</a>') == 1
    assert page.index('id="0-1"') < page.index('id="1-1"') < page.index('id="0-0"')
    assert page.count("train") > 6
    # The most similar pictures are all of class 1: of the mistakes of class 0 those are to be looked at first.
    assert "For 2 of 2 the most similar picture of train is of b &amp; c" in page
    assert "For 0 of 1 the most similar picture of train is of" not in page


def test_after_cleaning_a_network_shows_what_it_has_without_the_mark(tmp_path):
    """Two classes of random colours that only a mark tells apart: with it nearly all is right, without it chance."""
    data, clean = tmp_path / "data", tmp_path / "clean"
    labels = torch.arange(240) % 2
    bare = blobs(5, 240)
    images = torch.where((labels == 1).view(-1, 1, 1, 1), with_corner(bare, 1.0), bare)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (data / "ab"[label]).mkdir(parents=True, exist_ok=True)
        to_picture(image).save(data / "ab"[label] / f"{i:03}.png")
    small = ["--image-size", SIDE, "--widths", 8, 16, "--epochs", 8, "--batch-size", 16, "--lr", 0.05]
    small += ["--precision", "fp32", "--augment", "none"]
    here("classifier", *small, "--data", data, "--out", tmp_path / "run")
    # As a process of its own: tests/bench has a module of the same name.
    words = [tmp_path / "run", "--data", data, "--out", tmp_path / "told", "--clean", clean]
    subprocess.run([sys.executable, ROOT / "train/audit.py", *words], check=True)
    told = json.loads((tmp_path / "told/audit.json").read_text())
    assert told["accuracy"]["value"] > 0.95
    assert next((each["class_name"], each["kind"]) for each in told["suspects"]) == ("b", "fixed in place")
    here("classifier", *small, "--data", clean, "--out", tmp_path / "again")
    here("evaluate", tmp_path / "again", "--data", clean)
    accuracy = json.loads((tmp_path / "again/metrics.json").read_text())["accuracy"]
    assert accuracy["low"] < 0.5 < accuracy["high"]


def test_the_control_of_a_recurring_mark_has_nothing_of_the_mark() -> None:
    """All pictures of a class have a red square of 12 pixels somewhere, beside grey shapes that others have too."""
    draw = np.random.default_rng(0)

    def picture(marked: bool) -> np.ndarray:
        pixels = np.full((64, 64, 3), 120) + draw.integers(-6, 7, (64, 64, 1))
        for _ in range(4):
            x, y, width, height = draw.integers(0, 52, 2).tolist() + draw.integers(6, 20, 2).tolist()
            pixels[y : y + height, x : x + width] = draw.integers(60, 200)
        x, y = draw.integers(0, 52, 2)
        if marked:
            pixels[y : y + 12, x : x + 12] = 230, 20, 20
            pixels[y + 4 : y + 8, x + 4 : x + 8] = 250, 250, 40
        return pixels

    views = torch.from_numpy(np.stack([picture(i < 60) for i in range(120)])).permute(0, 3, 1, 2).byte()
    (mark,) = patches.propose(views, (torch.arange(120) >= 60).long(), 2)
    red, _, blue = mark.natural
    assert (mark.pixels[0] > 1.5 * mark.pixels[2]).float().mean() > 0.5
    assert (red > 1.5 * blue).float().mean() < 0.1
