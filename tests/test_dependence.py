"""cvlab.explain.paths: a map that depends on its region is told from one that does not."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import explain, predict, predicted_masks, region_score
from cvlab.explain.paths import dependence_sentence, region_dependence
from cvlab.explain.regions import box
from cvlab.models import Stage
from cvlab.transforms import view

ROOT = Path(__file__).resolve().parents[1]
REGION = box((16, 16), (2, 3), (9, 8))


def dependence(model, images, region, other=None, stages=None, method="grad_cam"):
    """By stage r between the maps of a region and of another one, by default the rest of the picture."""
    maps = explain(model, images, region_score(region), stages, [method]).maps
    return region_dependence(model, images, maps, region_score(~region if other is None else other))[method]


@pytest.mark.parametrize("other", [None, box((16, 16), (11, 11), (14, 14))])
def test_under_a_1x1_head_the_region_cancels_out_of_grad_cam_and_not_out_of_hires_cam(segmenter, images, other):
    # (logit - bias) / (H * W) everywhere, for any region.
    found = dependence(segmenter, images, REGION, other)
    assert list(found) == list(segmenter.stages)
    assert found["decoder1"].tolist() == pytest.approx([1] * 4, abs=1e-5)
    local = dependence(segmenter, images, REGION, other, stages=["decoder1"], method="hires_cam")
    assert local["decoder1"].max() < 0.5


class Halves(nn.Module):
    """Two channels, red and green; the logits are red in the left half and green in the right half."""

    task = "segmentation"

    def __init__(self):
        super().__init__()
        self.copy = nn.Conv2d(3, 2, 1, bias=False)
        self.copy.weight.data = torch.eye(3)[:2, :, None, None].clone()

    @property
    def stages(self):
        return {"copy": Stage(self.copy)}

    def forward(self, images):
        red, green = self.copy(images).split(1, 1)
        return torch.cat([red[..., :2], green[..., 2:]], 3)


def test_by_hand():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[0, 1] = 1 - images[0, 0]  # green is the opposite of red
    images[1, 1] = 0.5 * images[1, 0]  # green is red, but for a factor
    left = box((4, 4), (0, 0), (1, 3))
    found = dependence(Halves(), images, left)
    assert found["copy"].tolist() == pytest.approx([-1, 1])
    each = torch.stack([left, ~left])
    assert dependence(Halves(), images, each, ~each)["copy"].tolist() == pytest.approx([-1, 1])


def test_stages_of_the_shipped_segmenter_on_its_scenes():
    # The last decoder repeats the prediction for any region, and the one before nearly so.
    model = checkpoint.load(ROOT / "checkpoints" / "shapes-segmenter")
    images = torch.cat([view(shapes.scene(seed, 64).image, model) for seed in range(3500, 3506)])
    found = dependence(model, images, predicted_masks(model, predict(model, images)))
    assert found["decoder1"].min() > 0.9999
    assert found["decoder2"].min() > 0.9
    assert found["encoder1"].median() < 0.6


def test_only_a_map_that_hardly_depends_is_labelled():
    assert "0.97" in dependence_sentence(0.97)
    assert [dependence_sentence(r) for r in (0.9, 0.0, -1.0)] == [""] * 3  # opposite maps do depend on it


def test_a_region_that_cannot_be_compared_is_refused(segmenter, images):
    for region, other in ((REGION | True, None), (REGION, REGION & False), (REGION & False, None)):
        with pytest.raises(ValueError, match="region"):
            dependence(segmenter, images, region, other)
