"""cvlab.models.fused: a fused copy has the same logits and maps, and the model it is made from stays as it was."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from test_timm import images_of, tiny
from torch import nn

from cvlab.explain import class_score, explain, region_score
from cvlab.models import Stage
from cvlab.models.fused import fused

REGION = torch.zeros(16, 16, dtype=torch.bool)
REGION[3:9, 2:10] = True
METHODS = ["grad_cam", "hires_cam"]


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def assert_same(model, copy, images, score, tolerance=1e-5):
    expected, found = (explain(m, images, score, methods=METHODS) for m in (model, copy))
    pairs = [(found.logits, expected.logits), (found.scores, expected.scores)]
    for method in METHODS:
        assert list(found.maps[method]) == list(expected.maps[method])
        pairs += zip(found.maps[method].values(), expected.maps[method].values(), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_logits_and_maps_are_the_same(model, images):
    weights = deepcopy(model.state_dict())
    model.train()
    copy = fused(model)
    assert not norms(copy)
    assert not copy.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    score = region_score(REGION) if model.task == "segmentation" else class_score(1)
    assert_same(model, copy, images, score)


@pytest.mark.parametrize("architecture", ["test_resnet", "mobilenetv3_small_050", "regnetx_002", "test_byobnet"])
def test_networks_of_timm_are_fused(architecture):
    """The last three have batch normalisation and activation in one module."""
    model = tiny(architecture)
    copy = fused(model)
    assert len(norms(copy)) < len(norms(model)) / 2
    assert_same(model, copy, images_of(64), class_score(1))


def test_the_layout_is_that_of_the_copy_while_it_is_explained(segmenter, images):
    """Channels last all the way: where a hook loses it, every convolution converts its input."""
    copy, layouts = fused(segmenter), []
    for module in copy.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(
                lambda m, i: layouts.append(i[0].is_contiguous(memory_format=torch.channels_last))
            )
    explain(copy, images[:1], region_score(REGION))
    assert layouts
    assert all(layouts)


def test_a_network_without_batch_normalisation_stays_what_it_is():
    model = tiny("test_vit")
    assert_same(model, fused(model), images_of(64), class_score(1))


def test_a_convolution_that_is_a_stage_keeps_its_own_activation(classifier, images):
    classifier.__class__ = type("Stem", (type(classifier),), {"stages": property(lambda m: {"stem": Stage(m.stem[0])})})
    copy = fused(classifier)
    assert len(norms(copy)) == 1
    assert_same(classifier, copy, images, class_score(0))


class Fork(nn.Module):
    """What the convolution puts out is used twice."""

    task = "classification"
    image_size = 8

    def __init__(self):
        super().__init__()
        self.normalize = nn.Identity()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.running_mean)

    @property
    def stages(self):
        return {"norm": Stage(self.norm)}

    def forward(self, images):
        x = self.conv(self.normalize(images))
        return (F.relu(self.norm(x)) + x).mean((2, 3))


def test_a_network_that_cannot_be_fused_serves_as_it_is(classifier):
    fork = Fork().eval()
    assert fused(fork) is fork
    assert not norms(fused(classifier))


class Between(Fork):
    """An in-place activation stands between convolution and normalisation: they cannot be fused."""

    def forward(self, images):
        return self.norm(F.relu_(self.conv(self.normalize(images)))).mean((2, 3))


def test_what_an_activation_parts_is_not_fused():
    model = Between().eval()
    copy = fused(model)
    assert len(norms(copy)) == 1
    assert_same(model, copy, torch.rand(2, 3, 8, 8), class_score(1))
