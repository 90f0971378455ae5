"""cvlab.trust: what is hidden, and that verdicts follow evidence whose place is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import correlation
from cvlab.models import Stage
from cvlab.models.fused import fused
from cvlab.models.model import Grid
from cvlab.transforms import view
from cvlab.trust import hide, hottest_part, judge
from cvlab.trust.hiding import Hiding
from cvlab.trust.judge import LIMITS, SHARES, importance
from cvlab.trust.reliability import examine, oracle, summary

ROOT = Path(__file__).resolve().parents[1]


class Brightness(nn.Module):
    """Class 0 (or the mask, everywhere) is as likely as the top left quarter is bright."""

    class_names, threshold, image_size = ("bright", "dark"), 0.5, 32

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task, self.stages = task, {}

    def forward(self, images: Tensor) -> Tensor:
        mean = images[:, :, :16, :16].mean((1, 2, 3))
        if self.task == "classification":
            return torch.stack([8 * mean - 4, 4 - 8 * mean], 1)
        return (8 * mean - 4)[:, None, None, None].expand(-1, 1, 32, 32)


def bright_quarter() -> Tensor:
    images = torch.full((1, 3, 32, 32), 0.2)
    images[:, :, 2:14, 2:14] = 1.0
    return images


def square(rows: slice, columns: slice, size: int = 32) -> Tensor:
    region = torch.zeros(1, 1, size, size)
    region[:, :, rows, columns] = 1.0
    return region


def test_hidden_pixels_take_the_colours_around_them() -> None:
    """A patch on one colour vanishes without a trace; all that is visible stays to the bit."""
    plain = torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1).expand(1, 3, 37, 50)
    patched = plain.clone()
    patched[:, :, 5:30, 10:35] = torch.rand(1, 3, 25, 25, generator=torch.Generator().manual_seed(0))
    region = (patched != plain).any(1, keepdim=True)
    torch.testing.assert_close(hide(patched, region), plain)
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    region = square(slice(20, 30), slice(40, 60), 64).bool().expand(2, -1, -1, -1)
    grown = square(slice(19, 31), slice(39, 61), 64).bool().expand(2, 3, -1, -1)
    assert torch.equal(hide(noise, region)[~grown], noise[~grown])


def test_a_picture_of_which_nothing_is_left_is_its_mean_colour() -> None:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    hidden = hide(noise, torch.ones(1, 1, 16, 16, dtype=torch.bool))
    torch.testing.assert_close(hidden, noise.mean((2, 3), keepdim=True).expand_as(noise))
    assert torch.equal(hide(noise, torch.zeros(1, 1, 16, 16, dtype=torch.bool)), noise)


def test_the_hottest_part_has_the_area_that_was_asked_for_and_never_cold_pixels() -> None:
    heat = torch.arange(100.0).reshape(1, 1, 10, 10)
    assert hottest_part(heat, 0.1).nonzero().tolist() == [[9, column] for column in range(10)]
    assert hottest_part(square(slice(0, 1), slice(0, 3)), 0.1).sum() == 3
    with pytest.raises(ValueError, match="nothing to hide"):
        hottest_part(torch.zeros(1, 1, 10, 10), 0.1)


def test_a_map_that_is_the_same_everywhere_has_no_hottest_part() -> None:
    """Any tenth of it would be an arbitrary one."""
    with pytest.raises(ValueError, match="same everywhere"):
        hottest_part(torch.full((1, 1, 4, 4), 0.7), 0.1)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_map_of_what_decides_is_believable_and_its_opposite_is_not(task: str) -> None:
    """Class 0 is the brightness of the top left quarter, so its importance is known: there, and nowhere else."""
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.4
    images = noise + bright_quarter() * 0.6
    right, wrong = square(slice(0, 16), slice(0, 16)), square(slice(16, 32), slice(16, 32))
    found = judge(Brightness(task), images, {"right": right, "wrong": wrong, "flat": right * 0 + 1})
    assert [each.level for each in found.values()] == ["believable", "not believable", "doubtful"]
    assert judge(Brightness(task), images, right) == found["right"]


def test_a_spot_that_did_not_matter_is_never_said_to_have_mattered() -> None:
    """The map is right but for its hottest sixteenth, a corner that changes nothing."""
    heat = square(slice(0, 16), slice(0, 16)) + 1.05 * square(slice(24, 32), slice(24, 32))
    verdict = judge(Brightness("classification"), bright_quarter(), heat, 0)
    assert verdict.level == "believable"
    assert not verdict.checks["marked spot"].passed
    assert not verdict.sentence.startswith("The marked spot mattered")


def test_a_verdict_costs_44_pictures_and_ten_for_each_further_map() -> None:
    """Of a region, whose verdict has no curve: 35, and one."""
    heat, costs = square(slice(0, 16), slice(0, 16)), []
    for task in ("classification", "segmentation"):
        for maps in (heat, {"one": heat, "two": heat, "three": heat}):
            model, batches = Brightness(task), []
            model.register_forward_pre_hook(lambda module, inputs, seen=batches: seen.append(len(inputs[0])))
            judge(model, bright_quarter(), maps)
            costs.append(sum(batches))
    assert costs == [44, 64, 35, 37]


def test_shown_and_hidden_is_the_curve_of_pixels_in_the_map_s_order() -> None:
    """As pixel flipping (Bach et al., 2015) counts it, by NumPy, of a model that is linear in its pixels."""

    class Weighted(Brightness):
        weights = torch.arange(256.0).reshape(16, 16).flip(1)

        def forward(self, images: Tensor) -> Tensor:
            score = (images.mean(1) * self.weights).sum((1, 2)) / 1000
            return torch.stack([score, -score], 1)

    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    attribution = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    found = judge(Weighted("classification"), images, attribution, class_idx=0).checks["shown and hidden"].value
    order = np.argsort(-attribution.numpy().ravel(), kind="stable")
    curves = {"hidden": [], "shown": []}
    for share in SHARES:
        mask = np.zeros(256, dtype=bool)
        mask[order[: int(np.ceil(share * 256))]] = True
        for name, region in (("hidden", mask), ("shown", ~mask)):
            picture = hide(images, torch.from_numpy(region.reshape(1, 1, 16, 16))).numpy()
            curves[name].append((picture.mean(1)[0] * Weighted.weights.numpy()).sum() / 1000)
    whole = (images.numpy().mean(1)[0] * Weighted.weights.numpy()).sum() / 1000
    seen = [*curves["hidden"], *curves["shown"], whole]
    assert found == pytest.approx((np.mean(curves["shown"]) - np.mean(curves["hidden"])) / np.ptp(seen), abs=1e-5)


def test_importance_is_the_ridge_solution_and_finds_the_cell_that_decides() -> None:
    """Against NumPy's least squares of the stacked problem, whose penalty is a sum of squares."""
    rng = np.random.default_rng(0)
    hidden = rng.random((40, 1, 16, 16)) < 0.3
    cells = hidden.reshape(40, 8, 2, 8, 2).mean((2, 4)).reshape(40, 64)
    fall = 3 * cells[:, 27] + 0.01 * rng.normal(size=40)
    found = importance(torch.from_numpy(hidden), [torch.from_numpy(fall)]).flatten().numpy()
    x, y = cells - cells.mean(0), fall - fall.mean()
    rows = [a - b for i, a in enumerate(np.eye(64)) for j, b in enumerate(np.eye(64)) if beside(i, j)]
    strength = np.sqrt((x**2).sum() / 64)
    stacked = np.concatenate([x, strength * np.array(rows), strength * np.sqrt(0.05) * np.eye(64)])
    expected = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(len(rows) + 64)]), rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.argmax() == 27


def beside(i: int, j: int) -> bool:
    """Whether cell j of an 8 x 8 grid is the right or lower neighbour of cell i."""
    return (j - i == 1 and i % 8 < 7) or j - i == 8


def test_a_picture_that_is_of_the_class_without_anything_in_it_is_said_to_be_hard_to_judge() -> None:
    """Dark is the class of a picture of one dark colour, so that nothing in it can be hidden."""
    dark = torch.full((1, 3, 32, 32), 0.2) + 0.01 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    heat = square(slice(0, 16), slice(0, 16))
    for images, empty in ((dark, True), (bright_quarter(), False)):
        found = judge(Brightness("classification"), images, heat)
        assert found.checks["empty picture"].passed != empty
        assert (found.checks["empty picture"].sentence in found.sentence) == empty


def test_the_evidence_outside_a_region_is_told() -> None:
    """All that decides lies in the top left quarter, and the region is elsewhere."""
    region = square(slice(16, 32), slice(16, 32)).bool()[0, 0]
    outside, inside = square(slice(0, 16), slice(0, 16)), region[None, None].float()
    found = judge(Brightness("segmentation"), bright_quarter(), {"out": outside, "in": inside}, region=region)
    assert found["out"].checks["outside"].value == pytest.approx(1)
    assert found["in"].checks["outside"].value == pytest.approx(0)
    assert (found["out"].level, found["in"].level) == ("believable", "not believable")


def test_a_map_is_placed_by_its_stage_and_a_model_has_limits_of_its_own() -> None:
    """A stage whose third cell, not its first, lies over the corner where the model looks."""
    model, cells = Brightness("classification"), torch.zeros(1, 1, 4, 4)
    cells[..., 2, 2] = 1
    model.block = nn.Identity()
    model.block.grid = Grid(offset=-10.5, stride=8.0, side=32)
    model.stages = {"moved": Stage(model.block)}
    images = bright_quarter()
    stretched, moved = judge(model, images, cells), judge(model, images, cells, stage="moved")
    assert (stretched.level, moved.level) == ("not believable", "believable")
    assert judge(model, images, {"moved": cells})["moved"] == moved
    model.config = {"limits": [2.0, 1.9]}
    assert judge(model, images, cells, stage="moved").level == "not believable"


def test_planted_evidence_is_believed_and_the_same_shape_elsewhere_is_not() -> None:
    """Of scenes where the shape alone tells the class. The fused copy gives the same verdicts."""
    model = checkpoint.load(ROOT / "checkpoints" / "shapes-classifier")
    model.config.pop("limits", None)
    copy, levels = fused(model), {"there": [], "elsewhere": []}
    for seed in range(5000, 5008):
        scene = shapes.scene(seed, model.image_size)
        there = torch.from_numpy(scene.mask)[None, None].float()
        maps = {"there": there, "elsewhere": there.roll((model.image_size // 2,) * 2, (2, 3))}
        found, again = (judge(each, view(scene.image, model), maps, scene.label) for each in (model, copy))
        for name, judgement in found.items():
            assert judgement.level == again[name].level
            levels[name].append(judgement.level)
    assert levels["there"].count("believable") >= 5
    assert levels["elsewhere"].count("believable") <= 1


def test_the_oracle_finds_what_decides_and_its_halves_agree() -> None:
    images = bright_quarter() + 0.01 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    others = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cells, *halves = oracle(Hiding(Brightness("classification"), images, 0, None), others)
    quarter = square(slice(0, 4), slice(0, 4), 8)
    assert all(correlation(each, quarter) > 0.8 for each in (cells, *halves))


def test_shares_and_limits_are_counted_by_hand() -> None:
    """Forty pictures with one confirmed, one refuted and one undecided map; evidence from 0 to 0.39 where refuted."""
    model = Brightness("classification")
    model.stages = {"early": None, "late": None}
    pictures = [{"early": [0.1, i / 100], "late": [0.9, 1.0], "upside down": [0.3, 0.0]} for i in range(40)]
    found = summary(model, pictures)
    assert found["stages"]["early"] == {"confirmed": 0, "undecided": 0, "refuted": 40}
    assert found["stages"]["late"] == {"confirmed": 40, "undecided": 0, "refuted": 0}
    assert found["recommended"] == "late"
    assert found["limits"] == pytest.approx([np.quantile(np.arange(40) / 100, 0.95), LIMITS[1]], abs=1e-6)
    assert found["verdicts"]["confirmed"] == [40, 0, 0]
    # Of the even ones above the 95% quantile of the odd ones (0.371): 0.38; of the odd ones above 0.361: 0.37 and 0.39.
    assert found["verdicts"]["refuted"][0] == 3
    assert summary(model, pictures[:4])["limits"] == list(LIMITS)  # too few of them


def test_where_nothing_is_found_nothing_is_examined() -> None:
    assert examine(Brightness("segmentation"), torch.zeros(1, 3, 32, 32), bright_quarter()) == {}
