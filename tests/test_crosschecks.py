"""cvlab.crosschecks: what adds up, what is known of a linear model, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from cvlab.explain import class_score, contrast_score, predict, region_score
from cvlab.explain.regions import box
from cvlab.explain.slow import integrated_gradients, occlusion

REGION = box((16, 16), (2, 3), (9, 8))
WAYS = [
    lambda *asked, **options: integrated_gradients(*asked, steps=8, **options),
    lambda *asked, **options: occlusion(*asked, window=8, **options),
]


class Weighted(nn.Module):
    """Logit 0 is a weighted sum of the pixels, logit 1 is zero."""

    def __init__(self):
        super().__init__()
        weights = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
        self.weights = nn.Parameter(weights)

    def forward(self, images):
        logit = (images * self.weights).sum((1, 2, 3))
        return torch.stack([logit, 0 * logit], 1)


PICTURES = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))


def test_of_a_linear_model_each_pixel_has_its_term():
    model = Weighted()
    terms = ((PICTURES - 0.5) * model.weights.detach()).sum(1, keepdim=True)
    found = integrated_gradients(model, PICTURES, class_score(0), steps=3)
    torch.testing.assert_close(found, terms)
    torch.testing.assert_close(occlusion(model, PICTURES, class_score(0), window=1), terms)
    # A window of two pixels a side, side by side: the terms below it together.
    together = nn.functional.avg_pool2d(terms, 2, divisor_override=1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(occlusion(model, PICTURES, class_score(0), window=2, stride=2), together)


@pytest.mark.parametrize("way", WAYS)
def test_each_image_is_asked_for_its_own_class(classifier, images, way):
    class_idx = torch.tensor([2, 0, 1, 1])
    together = way(classifier, images, class_score(class_idx))
    assert together.shape == (4, 1, 16, 16)
    for i, image in enumerate(images.split(1)):
        torch.testing.assert_close(way(classifier, image, class_score(int(class_idx[i]))), together[i : i + 1])


def test_integrated_gradients_add_up_to_the_difference_from_the_baseline(classifier, segmenter, images):
    baseline = images.flip(0)
    for model, score in ((classifier, contrast_score(0, 2)), (segmenter, region_score(REGION, 1))):
        found = integrated_gradients(model, images, score, baseline, steps=100)
        wanted = score(predict(model, images)) - score(predict(model, baseline))
        torch.testing.assert_close(found.sum((1, 2, 3)), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_occlusion_finds_where_the_score_is_made(segmenter, images):
    # Covering what no pixel of the region sees changes nothing: a corner is out of reach of a single pixel.
    far = box((16, 16), (0, 0), (0, 0))
    segmenter.bottleneck.register_forward_hook(lambda module, inputs, output: output * 0)
    found = occlusion(segmenter, images, region_score(far), window=2, stride=2)
    assert found[..., :2, :2].abs().min() > 0
    assert found[..., 14:, 14:].abs().max() < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_progress_runs_from_little_to_all(classifier, images, way):
    told = []
    way(classifier, images, class_score(0), progress=told.append)
    assert told == sorted(told)
    assert 0 < told[0] <= 0.2
    assert told.count(1.0) == 1  # at the very end


@pytest.mark.parametrize("way", WAYS)
def test_no_trace_is_left(classifier, images, way):
    expected = way(classifier, images, class_score(0))
    classifier.train().requires_grad_(False)
    with torch.inference_mode():
        found = way(classifier, images.clone(), class_score(0))
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(module.training for module in classifier.modules())
    assert not any(module._forward_hooks for module in classifier.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    with pytest.raises(ValueError, match="no class"):
        way(classifier, images, class_score(5))
    assert all(module.training for module in classifier.modules())


def test_a_window_larger_than_the_image_is_refused(classifier, images):
    with pytest.raises(ValueError, match="17"):
        occlusion(classifier, images, class_score(0), window=17)
