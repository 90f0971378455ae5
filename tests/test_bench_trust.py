"""The measures of the bench of trust give what is worked out by hand, and the bench runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import trust
import trust_maps
import trust_measures as measures

from cvlab import checkpoint
from cvlab.explain import class_score, explain
from cvlab.models import build

LEFT = np.array([[1, 0, 0, 0], [1, 0, 0, 0]], bool)


def test_shapley_values_of_a_game_of_gloves():
    """Object 0 is a left glove, 1 and 2 are right ones; a pair is worth 6. Worked out: 4, 1 and 1."""
    scores = [6.0 * (subset & 1 and subset & 6 != 0) for subset in range(8)]
    assert measures.shapley(scores) == pytest.approx([4, 1, 1])


def test_shapley_values_add_up_and_are_exact_where_objects_do_not_interact():
    worth = np.array([0.5, -2.0, 3.0, 0.0])
    scores = [1.5 + sum(worth[i] for i in range(4) if subset >> i & 1) for subset in range(16)]
    assert measures.shapley(scores) == pytest.approx(worth)
    scores = np.random.default_rng(0).normal(size=32)
    assert measures.shapley(scores).sum() == pytest.approx(scores[-1] - scores[0])


def test_what_matters_is_worth_a_quarter_of_the_most_important():
    objects = np.eye(4, dtype=bool)[:, None]
    assert measures.what_matters(objects, np.array([8.0, 2.0, 1.9, -9.0])).tolist() == [[True, True, False, False]]
    assert not measures.what_matters(objects, np.array([0.0, -1.0, -2.0, 0.0])).any()


def test_mass_is_the_share_of_the_evidence():
    assert measures.mass(np.array([[3.0, 1, 0, 0], [0, 0, 1, 0]]), LEFT) == pytest.approx(3 / 5)
    assert measures.mass(np.zeros((2, 4)), LEFT) == pytest.approx(2 / 8)  # a blank map: chance
    assert measures.mass(np.ones((2, 4)), LEFT) == pytest.approx(2 / 8)
    assert np.isnan(measures.mass(np.ones((2, 4)), ~LEFT & LEFT))


def test_rank_counts_the_hottest_pixels():
    assert measures.rank(np.array([[9.0, 1, 0, 0], [2, 3, 1, 0]]), LEFT) == 1 / 2  # of the two hottest, 9 and 3
    assert measures.rank(np.array([[9.0, 1, 0, 0], [8, 3, 1, 0]]), LEFT) == 1
    # 9 is right; the other place is shared by four pixels of 2, of which one matters.
    assert measures.rank(np.array([[9.0, 2, 2, 2], [2, 0, 0, 0]]), LEFT) == pytest.approx((1 + 1 / 4) / 2)
    assert measures.rank(np.zeros((2, 4)), LEFT) == pytest.approx(2 / 8)


def test_the_ceiling_is_what_the_cells_can_show():
    area = np.zeros((8, 8), bool)
    area[:4, :4] = True
    assert measures.mass(measures.ceiling(area, 8, None), area) == 1
    # Of 2 x 2 cells the first is 1. Resized it falls along a row as 1 1 1 7/8 5/8 3/8 1/8 0 (0 and 1 at 1.5 and 5.5).
    row = np.array([1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8, 0, 0])
    assert measures.mass(measures.ceiling(area, 2, None), area) == pytest.approx((row[:4].sum() / row.sum()) ** 2)


def test_spearman_is_that_of_scipy_also_with_ties():
    from scipy.stats import spearmanr

    a, b = np.array([1.0, 2, 2, 5, 0, 2]), np.array([0.1, 3, 1, 9, 0.1, 7])
    assert measures.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert measures.spearman(a, np.ones(6)) == 0


def test_part_deletion_compares_orders():
    objects = np.zeros((3, 2, 4), bool)
    objects[0, 0, :3], objects[1, 1, 0], objects[2, 1, 3] = True, True, True
    heat = np.array([[2.0, 2, 2, 0], [5, 0, 0, 1]])  # evidence 6, 5, 1; by pixel 2, 5, 1
    assert measures.part_deletion(heat, objects, np.array([3.0, 2.0, 1.0])) == 1
    assert measures.part_deletion(heat, objects, np.array([1.0, 2.0, 3.0])) == 0
    assert measures.part_deletion(heat, objects, np.array([3.0, 2.0, 1.0]), per_pixel=True) == pytest.approx(0.75)
    assert measures.part_deletion(np.zeros((2, 4)), objects, np.array([3.0, 2.0, 1.0])) == 1 / 2
    objects[2] = False  # covered by others: it is not counted
    assert measures.part_deletion(heat, objects, np.array([3.0, 2.0, 9.0])) == 1


def test_single_deletion_compares_cells():
    heat = np.kron(np.arange(16.0).reshape(4, 4), np.ones((2, 2)))
    assert measures.single_deletion(heat, np.arange(16.0) ** 3) == pytest.approx(1)
    assert measures.single_deletion(heat, -np.arange(16.0)) == pytest.approx(-1)


def test_a_leak_is_evidence_in_other_cells_off_the_seams():
    heat = np.zeros((16, 16))
    heat[1, 1], heat[7, 9], heat[12, 3] = 3, 100, 1  # in the right cell, on a seam, in another cell
    assert measures.mosaic_leak(heat) == pytest.approx(1 / 4)
    assert np.isnan(measures.mosaic_leak(np.zeros((16, 16))))


def test_the_gate_is_passed_by_maps_that_depend_on_what_was_learned():
    assert measures.gate([0.1, -0.3, 0.9, np.nan])
    assert not measures.gate([0.9, 0.8, 0.1])


def test_infills_hide_the_region_and_its_border_alone():
    images, regions = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    regions[..., 20:30, 20:30] = True
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[19:31, 19:31] = False
    for kind in measures.INFILLS:
        hidden = measures.infill(images, regions, kind)
        assert torch.equal(hidden[..., outside], images[..., outside])
        assert hidden[..., 20:30, 20:30].std() < images[..., 20:30, 20:30].std() / 2
    assert torch.allclose(hidden[0, :, 25, 25], images.mean((2, 3))[0])


def test_the_interval_covers_the_mean():
    values = [0.0, 1.0] * 200 + [np.nan]
    mean, low, high = measures.interval(values)
    assert mean == 0.5
    assert (0.5 - low, high - 0.5) == pytest.approx((1.96 * 0.025, 1.96 * 0.025), rel=0.1)  # sd .5 over 20 is .025
    assert np.isnan(measures.interval([np.nan])).all()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("convnet", ["a", "b", "c"], 32, {"widths": [4, 8]}).eval()


def test_of_a_mosaic_only_the_first_picture_counts(model):
    images = torch.rand(4, 3, 32, 32)
    mosaic, together = trust_maps.Mosaic(model), trust_maps.beside(images)
    assert torch.equal(together[0, :, 32:, :32], images[2])
    assert torch.allclose(mosaic(together), model(images[:1]), atol=1e-6)
    (gradient,) = torch.autograd.grad(mosaic(together.requires_grad_())[0, 1], together)
    pixels = gradient[0].sum(0)
    assert pixels[:32, :32].any()
    assert not pixels[:32, 32:].any()
    assert not pixels[32:].any()
    maps = explain(mosaic, together, class_score(1), ["stage2"], ["grad_cam", "hires_cam"]).maps
    alone = explain(model, images[:1], class_score(1), ["stage2"], ["hires_cam"]).maps["hires_cam"]["stage2"]
    hires, grad_cam = maps["hires_cam"]["stage2"], maps["grad_cam"]["stage2"]
    assert torch.allclose(hires[..., :8, :8], alone, atol=1e-6)
    assert not hires[..., 8:].any()
    assert grad_cam[..., 8:].any()  # which averages gradients over the whole map


def test_layer_cam_is_that_of_pytorch_grad_cam(model):
    images = torch.rand(2, 3, 32, 32)
    question = trust_maps.Question(torch.tensor([0, 2]))
    found = {(kind, at): heat for kind, at, heat in trust_maps.ours(model, images, question)}
    expected = {kind: heat for kind, _, heat in trust_maps.by_grad_cam(model, images, question)}["grad-cam LayerCAM"]
    heat = found["LayerCAM", "stage2"]
    assert heat.shape == expected.shape == (2, 32, 32)
    for mine, theirs in zip(heat, expected, strict=True):  # theirs is stretched over the view and drawn by OpenCV
        assert np.corrcoef(mine.ravel(), theirs.ravel())[0, 1] > 0.9


def test_a_cell_is_greyed_at_a_time():
    images = torch.rand(1, 3, 16, 16)
    grey = trust.greyed(images)
    assert grey.shape == (16, 3, 16, 16)
    assert (grey[6, :, 4:8, 8:12] == 0.5).all()
    assert torch.equal(grey[6, :, 8:], images[0, :, 8:])


def test_the_infills_are_compared_with_drawing_anew():
    """A model that adds up all light: hiding an object by the mean colour changes what is inside of it alone."""

    class Light(nn.Module):
        def forward(self, images):
            return images.sum((1, 2, 3))[:, None]

    images = torch.zeros(1, 3, 64, 64)
    images[..., 10:20, 10:20] = 1
    objects = np.zeros((1, 64, 64), bool)
    objects[0, 10:20, 10:20] = True
    found = trust.infills(Light(), images, objects, trust_maps.Question(torch.tensor([0])), [300.0], seed=0)
    (hidden, left_out), mean = found["mean colour"]["objects"][0], 100 / 64**2
    assert left_out == 300
    assert hidden == pytest.approx(300 - 3 * mean * 12**2, abs=1e-2)  # with its border
    assert found["painted from around"]["objects"][0][0] == pytest.approx(300, abs=1e-2)  # around it all is black


def test_the_bench_runs_and_goes_on_where_it_was_stopped(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "bench" / "trust.py"), "--quick", "--json", str(tmp_path / "lines")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [trust.FIRST_SEED + i for i in range(4)]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    stages = list(checkpoint.load(trust.SHIPPED[0]).stages)
    for method in ("cvlab Grad-CAM", "cvlab HiResCAM", "LayerCAM"):
        assert sorted(row[1] for row in rows if row[0] == f"| {method}") == stages
    assert all(f"| {kind} |" in text for kind in ("grad-cam RefineCAM", *measures.INFILLS))
    assert "not valid" in text  # this model has seen no grey cells
    assert trust.page(lines) == text.rstrip("\n")
