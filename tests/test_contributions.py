"""cvlab.explain.paths: parts of a score worked out by hand, and that they add up."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import against, contrast_score, predict, predicted_score, region_score
from cvlab.explain.paths import contributions
from cvlab.explain.regions import box
from cvlab.models import build
from cvlab.transforms import view

ROOT = Path(__file__).resolve().parents[1]
REGION = box((16, 16), (2, 3), (9, 8))


def assert_adds_up(model, images, score):
    found = contributions(model, images, score)
    assert list(found) == [*model.cuts[0], "biases"]
    parts = torch.stack(list(found.values()))
    assert parts.shape == (len(parts), len(images))
    torch.testing.assert_close(
        parts.sum(0), score(predict(model, images)), rtol=1e-3, atol=1e-5 * parts.abs().max().item()
    )
    return found


@pytest.mark.parametrize("score", [region_score(REGION), region_score(REGION, 1), against(region_score(REGION))])
def test_the_parts_add_up_to_the_score(segmenter, images, score):
    parts = assert_adds_up(segmenter, images, score)
    assert all(part.abs().min() > 0 for part in parts.values())


def test_the_parts_of_the_opposite_are_the_opposite(segmenter, images):
    score = region_score(REGION)
    found, opposite = (contributions(segmenter, images, each) for each in (score, against(score)))
    assert all(torch.equal(opposite[name], -part) for name, part in found.items())


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_other_u_nets(images, depth, batch_norm):
    torch.manual_seed(0)
    model = (
        build("unet", ["a"], 16, {"width": 4, "depth": depth, "batch_norm": batch_norm}).eval().requires_grad_(False)
    )
    assert_adds_up(model, images, region_score(REGION))


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet", "mit_b0", "tu-test_mambaout"])
def test_u_nets_on_other_encoders(encoder):
    torch.manual_seed(0)
    model = build("smp", ["a", "b"], 64, {"encoder": encoder, "decoder_channels": [16, 8, 8, 4, 4]}).eval()
    images, region = torch.rand(2, 3, 64, 64), box((64, 64), (9, 12), (40, 33))
    parts = assert_adds_up(model, images, region_score(region, 1))
    assert [*parts] == ["skip2", "skip3", "skip4", "skip5", "bottleneck", "biases"]
    assert parts["bottleneck"].abs().min() > 0


def test_the_shipped_segmenter():
    model = checkpoint.load(ROOT / "checkpoints" / "shapes-segmenter")
    images = torch.cat([view(shapes.scene(seed, 64).image, model) for seed in range(3500, 3506)])
    parts = assert_adds_up(model, images, predicted_score(model))
    assert parts["biases"].abs().min() > 0


def silenced(model, *names):
    """The same U-Net with the ways cut through that have these names."""
    for name in names:
        place = model.bottleneck if name == "bottleneck" else model.skips[int(name.removeprefix("skip")) - 1]
        place.register_forward_hook(lambda module, inputs, output: output * 0)
    return model


@pytest.mark.parametrize("cut", [["skip1"], ["skip2"], ["bottleneck"], ["skip1", "skip2", "bottleneck"]])
def test_a_way_that_carries_nothing_has_no_part(segmenter, images, cut):
    # A gradient at an encoder's output would find what goes down beside the skip.
    silenced(segmenter, *cut)
    parts = assert_adds_up(segmenter, images, region_score(REGION))
    assert all((part == 0).all() == (name in cut) for name, part in parts.items())


def test_by_hand_where_nothing_bends():
    # Without ReLU each part is what remains of the score when the others are taken away.
    torch.manual_seed(0)
    model = build("unet", ["a"], 16, {"width": 3, "depth": 2}).eval()
    for decoder in model.decoders:
        decoder[2], decoder[5] = nn.Identity(), nn.Identity()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.bias)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    score = region_score(REGION)
    found = assert_adds_up(model, images, score)
    ways = ["skip1", "skip2", "bottleneck"]

    def score_without(*names):
        handles = [
            place.register_forward_hook(lambda module, inputs, output: output * 0)
            for name, place in zip(ways, (*model.skips, model.bottleneck), strict=True)
            if name in names
        ]
        value = score(predict(model, images))
        for handle in handles:
            handle.remove()
        return value

    torch.testing.assert_close(found["biases"], score_without(*ways), rtol=1e-4, atol=1e-5)
    for way in ways:
        torch.testing.assert_close(found[way], score_without() - score_without(way), rtol=1e-4, atol=1e-5)


def test_a_batch_is_divided_as_its_images_one_by_one(segmenter, images):
    together = contributions(segmenter, images, region_score(REGION))
    for i, image in enumerate(images.split(1)):
        alone = contributions(segmenter, image, region_score(REGION))
        for name, part in alone.items():
            torch.testing.assert_close(part, together[name][i : i + 1])


def test_it_leaves_no_trace(segmenter, images):
    segmenter.train()
    contributions(segmenter, images, region_score(REGION))
    assert all(module.training for module in segmenter.modules())
    assert not any(module._forward_hooks for module in segmenter.modules())
    assert all(parameter.grad is None for parameter in segmenter.parameters())


def test_what_has_no_parts_is_refused(classifier, segmenter, images):
    with pytest.raises(ValueError, match="U-Net"):
        contributions(classifier, images, contrast_score(0, 1))
    with pytest.raises(ValueError, match="linear"):
        contributions(segmenter, images, lambda logits: logits[:, 0].sigmoid().mean((1, 2)))
