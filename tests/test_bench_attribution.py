"""The measures of the bench of attribution give what is worked out by hand, peers' maps are ours, the bench runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import attribution
import attribution_maps
import trust
import trust_measures as measures
from trust_maps import Question

from cvlab.models import build


@pytest.fixture(scope="module")
def model():
    return attribution.untrained()


@pytest.fixture(scope="module")
def picture(model):
    return next(attribution.scenes(model, [0]))


def bright_square():
    """A black picture with a white square of 12 x 12, of which hiding, with its border, takes 4.8%."""
    images, region = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    images[..., 20:32, 40:52], region[:, 20:32, 40:52] = 1, True
    return attribution.Picture(0, images), Question(regions=region)


class Light(nn.Module):
    """A segmenter whose logit is how light a pixel is."""

    def forward(self, images):
        return images.mean(1, keepdim=True)


def test_a_map_that_is_the_truth_has_a_correlation_of_1():
    objects = np.zeros((4, 8, 8), bool)
    objects[0, :2, :2], objects[1, 4, 4:], objects[2, 7, 0] = True, True, True  # the fourth is covered by others
    falls = np.array([3.0, 1.0, 0.5, 9.0])
    heat = sum(np.where(each, fall / max(each.sum(), 1), 0) for each, fall in zip(objects, falls, strict=True))
    assert attribution.truth(heat, objects, falls) == pytest.approx(1)
    assert attribution.truth(heat, objects, -falls) == pytest.approx(-1)
    # The same on every pixel of what is worth something: added up, the large objects get more.
    even = objects.any(0).astype(float)
    assert attribution.truth(even, objects, falls) == pytest.approx(np.corrcoef([4, 4, 1], falls[:3])[0, 1])
    assert attribution.truth(even, objects, falls, per_pixel=True) == 0
    assert attribution.truth(heat, objects, np.array([0.75, 0.25, 0.5, 9]), per_pixel=True) == pytest.approx(1)
    assert attribution.truth(np.zeros((8, 8)), objects, falls) == 0
    assert np.isnan(attribution.truth(heat, objects[:1], falls[:1]))


def test_an_object_is_worth_what_the_score_falls_without_it(picture):
    """To a network that sees how light the region is, only objects on it are worth anything."""
    objects = picture.objects
    target = int(objects.sum((1, 2)).argmax())
    score = Question(regions=torch.from_numpy(objects[target])[None]).scores
    whole, *rest = score(Light()(torch.cat([picture.images, picture.without]))).tolist()
    assert rest[target] != whole
    beside = [i for i in range(len(objects)) if i != target and not (objects[i].any(0) & objects[target].any(0)).any()]
    assert all(rest[i] == whole for i in beside)


@pytest.mark.parametrize("share", attribution.SHARES)
def test_every_map_hides_as_much_of_the_picture(share):
    rng = np.random.default_rng(0)
    spot = np.zeros((64, 64))
    spot[10, 50] = 1
    for heat in (rng.random((64, 64)), spot, np.outer(np.arange(64), np.ones(64))):
        hidden = torch.from_numpy(attribution.hottest(heat, share))[None, None]
        grown = torch.nn.functional.max_pool2d(hidden.float(), 3, 1, 1).mean().item()
        assert share - 1e-3 < grown < share + 9 / 64**2
        assert heat[hidden[0, 0].numpy()].min() >= heat[~hidden[0, 0].numpy()].max()


def test_a_region_is_hidden_from_its_middle():
    _, asked = bright_square()
    hidden = attribution.hottest(asked.regions[0].float().numpy(), 0.01)
    y, x = np.nonzero(hidden)
    assert asked.regions[0].numpy()[hidden].all()
    assert (y.mean(), x.mean()) == pytest.approx((25.5, 45.5), abs=1)


def test_the_area_under_a_curve_that_falls_at_once_is_worked_out():
    """From 5% on the square is black: 0 of a scale on which 1 is white and 0 the mean colour m = 144 / 64^2."""
    picture, asked = bright_square()
    deletion, m = attribution.Deletion(Light(), picture, asked), 144 / 64**2
    fallen = -m / (1 - m)
    region = asked.regions[0].float().numpy()
    assert deletion.area(region) == pytest.approx((0.05 * (1 + fallen) / 2 + 0.35 * fallen) / 0.4, abs=1e-3)
    assert deletion.less_chance(region) == pytest.approx(deletion.area(region) - deletion.by_chance)
    assert deletion.by_chance > deletion.area(region)
    assert deletion.less_chance(np.zeros((64, 64))) == 0
    assert deletion.less_chance(3 * region) == deletion.less_chance(region)


def test_evidence_leaks_off_the_grown_region_and_what_may_matter():
    _, asked = bright_square()  # grown by 6: rows 14 to 37, columns 34 to 57
    heat, other = np.zeros((64, 64)), np.zeros((64, 64), bool)
    heat[25, 45], heat[14, 34], heat[13, 34], heat[0, 0], other[0, 0] = 1, 2, 4, 8, True
    region = asked.regions[0].numpy()
    assert 1 - measures.mass(heat, attribution.may_matter(region, ~other & other)) == pytest.approx(12 / 15)
    assert 1 - measures.mass(heat, attribution.may_matter(region, other)) == pytest.approx(4 / 15)


def test_a_small_change_is_small(picture):
    apart = attribution.changed(picture) - picture.images
    assert 0 < apart.mean() < 0.03
    assert (apart - 0.03 * picture.images).abs().max() < 6 * 2 / 255


def test_peers_maps_are_ours(model, picture):
    asked = trust.questions(model, picture.images)["region"]
    maps = attribution_maps.all_maps(model, picture.images, asked, 0)
    found = attribution_maps.differences(model, picture.images, asked, maps)
    assert found.keys() == {attribution_maps.TORCHCAM, attribution_maps.GRAD_CAM}
    assert max(found.values()) < 1e-5
    for method in ("grad_cam", "hires_cam", *found):
        assert [stage for name, stage in maps if name == method] == list(model.stages)
    other = maps | {(attribution_maps.TORCHCAM, "decoder1"): 2 * maps[attribution_maps.TORCHCAM, "decoder1"]}
    assert attribution_maps.differences(model, picture.images, asked, other)[attribution_maps.TORCHCAM] > 0.5
    assert all(each.grad is None for each in model.parameters())
    assert not any(each._forward_hooks for each in model.modules())


def test_what_is_better_than_the_default_is_named():
    default = np.full((6, 20), 0.5)
    own = default + np.array([0.1, 0.1, -0.1, 0.1, -0.1, 0.0])[:, None]  # in the order of HIGHER
    assert attribution.against(own, default) == "better truth, per pixel, leakage; worse mass, deletion"
    assert attribution.against(default + np.random.default_rng(0).normal(0, 1, (6, 20)), default) == ""  # by chance
    assert attribution.against(default + 0.009, default) == ""  # too little to name
    assert attribution.against(np.full((6, 20), np.nan), default) == ""


def test_the_bench_runs_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    path, threads = tmp_path / "lines.jsonl", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["attribution.py", "--quick", "--json", str(path)])
    attribution.main()
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    facts, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["picture"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["rows"][f"{attribution.REGION} | "][4] == 0  # the region leaks nothing
        assert line["rows"]["a blob in the middle | "][5] == 1  # what never looks at the picture is robust
        assert max(line["differences"].values()) < 1e-5
    rows = [line.removeprefix("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    stages = list(build("unet", ["object"], 32, {"width": 8, "depth": 2}).stages)
    for method in ("grad_cam", "hires_cam", attribution_maps.TORCHCAM, attribution_maps.GRAD_CAM):
        assert [row[1] for row in rows if row[0] == method] == stages
        assert all(f"{method} | {stage}" in facts["times"] for stage in stages)
    assert attribution.page([facts, *lines]) == text.rstrip("\n")
    assert list(attribution.collect("scenes", None, lambda numbers: iter(numbers), 4, 1, [facts, *lines])) == []
