"""cvlab.explain against answers worked out by hand, two identities, Captum, pytorch-grad-cam and its own promises."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel

from cvlab import checkpoint
from cvlab.explain import (
    against,
    class_score,
    contrast_score,
    correlation,
    default_stage,
    explain,
    grad_cam,
    heatmap,
    peak,
    predict,
    predicted_masks,
    predicted_score,
    region_score,
)
from cvlab.models import Stage, build, mask_levels
from cvlab.trust import judge
from cvlab.trust.diagnosis import diagnose

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = sorted(path.parent for path in ROOT.glob("checkpoints/*/config.json"))

REGION = torch.zeros(16, 16, dtype=torch.bool)
REGION[3:9, 2:10] = True

# Both ways to a map of what the model itself says, at its default stage.
WAYS = {
    "explain": lambda model, images: explain(model, images, predicted_score(model)).maps["grad_cam"][
        default_stage(model)
    ],
    "grad_cam": lambda model, images: grad_cam(model, images)[1],
}


def of_one_stage(model, images, stage):
    return explain(model, images, predicted_score(model), [stage])


class Pencil(nn.Module):
    """Small enough for pencil and paper: a 1x1 convolution to two channels, `after` it, the mean, a linear layer."""

    task = "classification"

    def __init__(self, after):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.after = after
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, -1]]).view(2, 3, 1, 1))  # red; green - blue
            self.head.weight.copy_(torch.tensor([[2.0, 1], [-1, 4]]))
            self.head.bias.copy_(torch.tensor([0.5, -0.5]))

    @property
    def stages(self):
        return {"conv": Stage(self.conv), "after": Stage(self.after)}

    def forward(self, images):
        return self.head(self.after(self.conv(images)).mean((2, 3)))


# The convolution makes [[1, 0], [0.5, 0]] and [[0, 1], [-1, 0.5]] of it.
PENCIL_IMAGE = torch.tensor([[[1.0, 0], [0.5, 0]], [[0, 1], [0, 0.5]], [[0, 0], [1, 0]]])[None]


def as_map(rows):
    return torch.tensor(rows)[None, None]


def assert_close(found, expected, tolerance=1e-5):
    """Within `tolerance` of the largest absolute value, which is not 0."""
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def half_masked(model, images):
    """A segmenter with a threshold at which it finds something, whatever it has learnt."""
    if model.task == "segmentation":
        levels = mask_levels(model, predict(model, images))
        model.threshold = levels[:, getattr(model, "first_object", 0)].median().item()
    return model


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_grad_cam_by_hand():
    # The gradient of logit c at every pixel is head.weight[c] / 4.
    model = Pencil(nn.Identity())
    expected = {0: as_map([[0.5, 0.25], [0.0, 0.125]]), 1: as_map([[-0.25, 1.0], [-1.125, 0.5]])}
    for class_idx, attribution in expected.items():
        logits, found = grad_cam(model, PENCIL_IMAGE, class_idx, "conv")
        assert torch.equal(logits, torch.tensor([[1.375, -0.375]]))
        assert torch.equal(found, attribution)
        explanation = explain(model, PENCIL_IMAGE, class_score(class_idx))
        assert torch.equal(explanation.maps["grad_cam"]["conv"], attribution)
        assert torch.equal(explanation.scores, logits[:, class_idx])
    contrast = explain(model, PENCIL_IMAGE, contrast_score(0, 1)).maps["grad_cam"]["after"]
    assert torch.equal(contrast, expected[0] - expected[1])
    assert torch.equal(grad_cam(model, PENCIL_IMAGE)[1], expected[0])  # of itself: the class of the larger logit


def test_an_activation_overwritten_in_place_is_read_as_it_was():
    # The ReLU lets the gradient through at two pixels a channel: its means are 0.25 and 0.125. The overwritten
    # activation would give 0.125 at the pixel where the second channel is -1.
    model = Pencil(nn.ReLU(inplace=True))
    explanation = explain(model, PENCIL_IMAGE, class_score(0), ["conv"], ["grad_cam", "hires_cam"])
    expected = as_map([[0.25, 0.125], [0.0, 0.0625]])
    assert torch.equal(explanation.maps["grad_cam"]["conv"], expected)
    assert torch.equal(explanation.maps["hires_cam"]["conv"], as_map([[0.5, 0.25], [0.25, 0.125]]))
    assert torch.equal(grad_cam(model, PENCIL_IMAGE, 0, "conv")[1], expected)


class ChannelsLast(nn.Module):
    def forward(self, activation):
        return activation.permute(0, 2, 3, 1).flatten(1, 2)  # (N, tokens, C)


class Tokens(Pencil):
    """The same network with a stage of tokens, as in a transformer."""

    def __init__(self):
        super().__init__(ChannelsLast())

    @property
    def stages(self):
        return {"tokens": Stage(self.after, lambda tokens: tokens.unflatten(1, (2, 2)).permute(0, 3, 1, 2))}

    def forward(self, images):
        return self.head(self.after(self.conv(images)).mean(1))


def test_to_map_brings_activation_and_gradient_into_place():
    found = explain(Tokens(), PENCIL_IMAGE, class_score(1), methods=["grad_cam", "hires_cam"]).maps
    assert torch.equal(found["grad_cam"]["tokens"], as_map([[-0.25, 1.0], [-1.125, 0.5]]))
    assert torch.equal(found["hires_cam"]["tokens"], as_map([[-0.25, 1.0], [-1.125, 0.5]]))


class RedSeer(nn.Module):
    """Its logit is how much red there is, in cells of 4 x 4 pixels; grey says nothing to it."""

    task = "classification"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        self.cells = nn.AvgPool2d(4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1))

    @property
    def stages(self):
        return {"cells": Stage(self.cells)}

    def forward(self, images):
        return self.cells(self.conv(images).relu()).mean((2, 3))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_the_peak_lies_on_planted_evidence(seed, method):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 1, 32, 32, generator=generator).repeat(1, 3, 1, 1)
    top, left = torch.randint(0, 32 - 8, (2,), generator=generator).tolist()
    images[:, :, top : top + 8, left : left + 8] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    attribution = explain(RedSeer(), images, class_score(0), methods=[method]).maps[method]["cells"]
    row, column = divmod(heatmap(attribution, (32, 32)).flatten().argmax().item(), 32)
    assert top <= row < top + 8
    assert left <= column < left + 8
    # 8 pixels hold a whole cell, which is all red: an activation of 1, and a gradient of 1/64.
    assert peak(attribution).tolist() == [1.0]


# --- identities -------------------------------------------------------------------------------------------------------


def test_under_pooling_and_a_linear_layer_the_map_adds_up_to_the_logit(classifier, images):
    # logit = sum over channels of weight * mean(activation) + bias, and the gradient is weight / (h * w) everywhere.
    for class_idx in range(3):
        explanation = explain(classifier, images, class_score(class_idx), ["stage2"], ["grad_cam", "hires_cam"])
        without_bias = explanation.logits[:, class_idx] - classifier.head.bias[class_idx].detach()
        for maps in explanation.maps.values():
            assert_close(maps["stage2"].sum((1, 2, 3)), without_bias)


@pytest.mark.parametrize("class_idx", [0, 1])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(5, 16)])
def test_under_a_1x1_head_the_map_is_the_score_map_whatever_the_region(segmenter, images, class_idx, rows):
    # The gradient of the mean logit over M is weight / |M| inside M and 0 outside. Its mean over the image is
    # weight / (H * W), so Grad-CAM is (logit - bias) / (H * W) everywhere: M has cancelled out.
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[rows, 3:7] = True
    score = region_score(region, class_idx)
    with torch.no_grad():  # evidence for both classes: a map without any is called blank
        segmenter.head.weight.copy_(torch.tensor([[1.0, -1, 1, -1], [1, 1, 1, 1]])[..., None, None])
    explanation = explain(segmenter, images, score, ["decoder1"], ["grad_cam", "hires_cam"])
    bias = segmenter.head.bias[class_idx].detach()
    score_map = explanation.logits[:, class_idx : class_idx + 1] - bias
    attribution = explanation.maps["grad_cam"]["decoder1"]
    assert_close(attribution, score_map / (16 * 16))
    assert diagnose(attribution[:1], explanation.logits[:1], class_idx).startswith("Tautology")
    # The mean logit itself: the map adds up to it inside the region, but for |M| / (H * W) and the bias.
    inside = (attribution * region).sum((1, 2, 3))
    assert_close(inside, (explanation.scores - bias) * region.sum() / (16 * 16))

    local = explanation.maps["hires_cam"]["decoder1"]
    assert_close(local, score_map * region / region.sum())
    assert not local[..., ~region].any()


# --- oracles ----------------------------------------------------------------------------------------------------------


def assert_equal_to_captum(model, images):
    half_masked(model, images)
    score = predicted_score(model)
    stages = [name for name, stage in model.stages.items() if stage == Stage(stage.module)]  # Captum knows no tokens
    assert stages
    explanation = explain(model, images, score, methods=["grad_cam", "hires_cam"])
    assert_close(explanation.logits, model(images).detach())
    for name in stages:
        module = model.stages[name].module
        expected = LayerGradCam(lambda images: score(model(images)), module).attribute(images)
        logits, found = grad_cam(model, images, stage=name)
        assert_close(found, expected)
        assert_close(logits, explanation.logits)
        assert_close(explanation.maps["grad_cam"][name], expected)
        product = LayerGradientXActivation(lambda images: score(model(images)), module).attribute(images)
        assert_close(explanation.maps["hires_cam"][name], product.sum(1, keepdim=True))


def test_every_stage_is_equal_to_captum(model, images):
    assert_equal_to_captum(model, images)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_every_stage_of_a_shipped_checkpoint_is_equal_to_captum(folder):
    model = checkpoint.load(folder)
    side = 64 if model.config["network"] in ("convnet", "unet") else model.image_size  # those take smaller images too
    assert_equal_to_captum(model, torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)))


def folded(model):
    """A copy with every BatchNorm folded into the convolution before it, in channels_last."""
    model = deepcopy(model)
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(sequence) - 1):
            if isinstance(sequence[i], nn.Conv2d) and isinstance(sequence[i + 1], nn.BatchNorm2d):
                sequence[i], sequence[i + 1] = fuse_conv_bn_eval(sequence[i], sequence[i + 1]), nn.Identity()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model.to(memory_format=torch.channels_last)


def assert_folded_is_equal_to_captum_unfolded(model, images):
    score = region_score(REGION) if model.task == "segmentation" else class_score(1)
    explanation = explain(folded(model), images.to(memory_format=torch.channels_last), score)
    for name, stage in model.stages.items():
        expected = LayerGradCam(lambda images: score(model(images)), stage.module).attribute(images)
        assert_close(explanation.maps["grad_cam"][name], expected)


def test_folded_and_channels_last_is_equal_to_captum_on_the_model_as_it_was(model, images):
    assert_folded_is_equal_to_captum_unfolded(model, images)


@pytest.mark.parametrize("name", ["shapes-classifier", "shapes-segmenter"])
def test_a_folded_shipped_checkpoint_is_equal_to_captum_on_it_as_it_was(name, images):
    assert_folded_is_equal_to_captum_unfolded(checkpoint.load(ROOT / "checkpoints" / name), images)


def test_the_last_stage_is_equal_to_pytorch_grad_cam(classifier, images):
    # Asked for its raw map: what it returns is resized and stretched to 0..1.
    layer = classifier.stages["stage2"].module
    wanted = [ClassifierOutputTarget(class_idx) for class_idx in (0, 1, 2, 1)]
    with GradCAM(model=classifier, target_layers=[layer]) as cam:
        cam(input_tensor=images, targets=wanted)
        activations, gradients = cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0]
        raw = cam.get_cam_image(images, layer, wanted, activations.detach().numpy(), gradients.numpy())
    found = grad_cam(classifier, images, torch.tensor([0, 1, 2, 1]))[1]
    assert_close(found[:, 0], torch.from_numpy(raw))


# --- without a trace --------------------------------------------------------------------------------------------------


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


def traces(model):
    """What explaining could leave behind: weights and statistics, modes, gradients, hooks."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    return weights, modes, [parameter.grad for parameter in model.parameters()], hooks(model)


def assert_no_trace(model, before):
    weights, modes, gradients, found_hooks = traces(model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())
    assert modes == before[1]
    assert gradients == [None] * len(gradients)
    assert found_hooks == []


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_training_is_explained_in_eval_mode_and_left_as_it_was(model, images, way):
    half_masked(model, images)
    expected, logits = WAYS[way](model, images), predict(model, images)
    model.train()
    batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    batch_norms[1].eval()  # as where a part of a network is frozen
    before = traces(model)
    assert torch.equal(WAYS[way](model, images), expected)
    assert_no_trace(model, before)
    assert torch.equal(predict(model, images), logits)
    assert_no_trace(model, before)


def test_nothing_is_left_behind_when_the_score_fails(model, images):
    model.train()
    before = traces(model)

    def failing(logits):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        explain(model, images, failing)
    assert_no_trace(model, before)
    with pytest.raises(ValueError, match="no class 7"):  # raised between Captum's hooks
        grad_cam(model, images, class_idx=7)
    assert_no_trace(model, before)
    for way in WAYS.values():  # the forward pass itself
        with pytest.raises(ValueError, match="images must be"):
            way(model, images[:, :2])
        assert_no_trace(model, before)


@pytest.mark.parametrize("way", [of_one_stage, grad_cam])
def test_no_graph_is_made_below_the_stage(model, images, way):
    half_masked(model, images)
    stage = default_stage(model)
    kept = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, o, name=name: kept.update({name: o.requires_grad}))
    way(model, images, stage=stage)
    place = next(name for name, module in model.named_modules() if module is model.stages[stage].module)
    below = list(kept)[: next(i for i, name in enumerate(kept) if name.startswith(place + "."))]
    assert below
    assert not any(kept[name] for name in below)
    assert kept["head"]
    assert torch.is_grad_enabled()


def test_hooks_of_others_stay(classifier, images):
    seen = []
    classifier.stages["stage1"].module.register_forward_hook(lambda *arguments: seen.append(1))
    explain(classifier, images, class_score(0))
    grad_cam(classifier, images, 0, "stage1")
    assert len(hooks(classifier)) == 1
    assert len(seen) == 2  # one forward pass each


@pytest.mark.parametrize("way", WAYS)
def test_frozen_parameters_are_explained(model, images, way):
    half_masked(model, images)
    expected = WAYS[way](model, images)
    model.requires_grad_(False)
    assert torch.equal(WAYS[way](model, images), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_images_are_explained_where_gradients_are_off(model, images, way, mode):
    half_masked(model, images)
    expected = WAYS[way](model, images)
    with mode():
        made_here = images.clone()
        assert torch.equal(WAYS[way](model, made_here), expected)
    assert torch.equal(WAYS[way](model, made_here), expected)  # of inference_mode: an inference tensor
    assert not expected.requires_grad
    assert not images.requires_grad


def test_classes_and_regions_may_be_inference_tensors(classifier, segmenter, images):
    with torch.inference_mode():
        class_idx, region = torch.tensor([0, 2, 1, 0]), torch.ones(16, 16, dtype=torch.bool)
    for score in (class_score(class_idx), contrast_score(class_idx, 1)):
        assert torch.equal(explain(classifier, images, score).scores, score(predict(classifier, images)))
    assert_close(explain(segmenter, images, region_score(region)).scores, predict(segmenter, images)[:, 0].mean((1, 2)))


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_explained_as_its_images_one_by_one(model, images, way):
    half_masked(model, images)
    assert_close(WAYS[way](model, images), torch.cat([WAYS[way](model, image[None]) for image in images]))


def test_each_image_is_asked_for_its_own_class(classifier, images):
    class_idx = torch.tensor([2, 0, 1, 1])
    together = grad_cam(classifier, images, class_idx)[1]
    alone = [grad_cam(classifier, images[i : i + 1], int(class_idx[i]))[1] for i in range(4)]
    assert_close(together, torch.cat(alone))


def test_a_stage_is_the_same_alone_and_among_others(model, images):
    score = predicted_score(half_masked(model, images))
    together = explain(model, images, score).maps["grad_cam"]
    assert list(together) == list(model.stages)
    for name in model.stages:
        alone = explain(model, images, score, [name]).maps["grad_cam"]
        assert list(alone) == [name]
        assert_close(alone[name], together[name])


@pytest.mark.parametrize("way", WAYS)
def test_eight_threads_get_the_answers_of_one(model, way):
    many = torch.rand(8, 1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).repeat(6, 1, 1, 1, 1)
    half_masked(model, many[:8, 0])
    expected = [WAYS[way](model, images) for images in many[:8]] * 6
    model.train()
    before = traces(model)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda images: WAYS[way](model, images), many))
    for attribution, alone in zip(found, expected, strict=True):
        assert_close(attribution, alone)
    assert_no_trace(model, before)


# --- scores -----------------------------------------------------------------------------------------------------------

CLASS_LOGITS = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, -1.0]])
PIXEL_LOGITS = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 0], [8, 0]]], [[[-1.0, -2], [-3, -4]], [[5, 0], [1, 0]]]])


def test_class_and_contrast_scores_by_hand():
    assert class_score(1)(CLASS_LOGITS).tolist() == [-2, 3]
    assert class_score(torch.tensor([2, 0]))(CLASS_LOGITS).tolist() == [4, 0.5]
    assert contrast_score(0, 2)(CLASS_LOGITS).tolist() == [-3, 1.5]
    assert contrast_score(torch.tensor([2, 1]), 0)(CLASS_LOGITS).tolist() == [3, 2.5]
    assert against(class_score(1))(CLASS_LOGITS).tolist() == [2, -3]


def test_region_scores_by_hand():
    region = torch.tensor([[True, False], [True, False]])
    assert region_score(region)(PIXEL_LOGITS).tolist() == [2, -2]
    assert region_score(region, 1)(PIXEL_LOGITS).tolist() == [4, 3]
    regions = torch.stack([region, ~region])  # one for each image
    assert region_score(regions)(PIXEL_LOGITS).tolist() == [2, -3]
    assert region_score(regions[:, None])(PIXEL_LOGITS).tolist() == [2, -3]


def test_the_predicted_score_is_what_the_model_says():
    model = Pencil(nn.Identity())
    assert predicted_score(model)(CLASS_LOGITS).tolist() == [4, 3]
    model.task, model.threshold = "segmentation", 0.1
    logits = torch.tensor([[[[1.0, -2], [-5, -9]]]])  # probabilities 0.73, 0.12, 0.007, 0.0001
    assert predicted_masks(model, logits).tolist() == [[[[True, True], [False, False]]]]
    assert predicted_score(model)(logits).tolist() == [-0.5]


@pytest.mark.parametrize("class_idx", [3, -1, torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_a_class_that_is_not_there_is_refused(class_idx):
    wrong = 3 if 3 in torch.as_tensor(class_idx) else -1
    for score in (class_score(class_idx), contrast_score(0, class_idx), contrast_score(class_idx, 0)):
        with pytest.raises(ValueError, match=f"no class {wrong}:"):
            score(CLASS_LOGITS)


@pytest.mark.parametrize(
    ("region", "class_idx"),
    [
        (torch.zeros(2, 2, dtype=torch.bool), 0),
        (torch.tensor([[[True, True], [True, True]], [[False, False], [False, False]]]), 0),  # empty for one image
        (torch.ones(4, 4, dtype=torch.bool), 0),
        (torch.ones(2, dtype=torch.bool), 0),
        (torch.ones(3, 2, 2, dtype=torch.bool), 0),  # three regions for two images
        (torch.ones(2, 2), 0),
        (torch.ones(2, 2, dtype=torch.uint8), 0),
        (torch.ones(2, 2, dtype=torch.bool), 2),
        (torch.ones(2, 2, dtype=torch.bool), -1),
    ],
)
def test_a_region_that_cannot_be_asked_about_is_refused(region, class_idx):
    with pytest.raises(ValueError, match=r"region|class"):
        region_score(region, class_idx)(PIXEL_LOGITS)


def test_an_unknown_stage_or_method_is_refused(model, images):
    with pytest.raises(ValueError, match="stage9"):
        explain(model, images, class_score(0), ["stage9"])
    with pytest.raises(ValueError, match="stage9"):
        grad_cam(model, images, stage="stage9")
    with pytest.raises(ValueError, match="score_cam"):
        explain(model, images, class_score(0), methods=["score_cam"])


@pytest.mark.parametrize("way", [*WAYS.values(), predict])
def test_what_is_no_batch_of_images_is_refused(model, images, way):
    for wrong in (images[0], images[:, :1], images[:, 0], (images * 255).byte()):
        with pytest.raises(ValueError, match="images must be"):
            way(model, wrong)


@pytest.mark.parametrize("way", [*WAYS.values(), predict])
@pytest.mark.parametrize("network", ["plain", "unet"])
def test_a_size_that_the_network_cannot_take_is_refused(network, way):
    model = build(network, ["a", "b"], 16, {"widths": [4, 8]} if network == "plain" else {"width": 4, "depth": 2})
    with pytest.raises(ValueError, match="22x22"):
        way(model, torch.rand(1, 3, 22, 22))
    assert predict(model, torch.rand(1, 3, 16, 16)).shape[1] == 2


def test_an_empty_predicted_mask_is_refused(segmenter, images):
    segmenter.threshold = 1.0
    for class_idx in (None, 1):
        with pytest.raises(ValueError, match="empty"):
            grad_cam(segmenter, images, class_idx)


def test_grad_cam_of_a_segmenters_class_is_that_of_its_predicted_mask(segmenter, images):
    logits = predict(segmenter, images)
    segmenter.threshold = logits[:, 1].sigmoid().median().item()
    score = region_score(predicted_masks(segmenter, logits)[:, 1], 1)
    expected = explain(segmenter, images, score, ["encoder2"]).maps["grad_cam"]["encoder2"]
    assert_close(grad_cam(segmenter, images, 1, "encoder2")[1], expected)


# --- reading maps -----------------------------------------------------------------------------------------------------


def test_default_stage(classifier, segmenter):
    assert default_stage(classifier) == "stage2"
    assert default_stage(segmenter) == "decoder2"


def test_heatmap_by_hand():
    # Bilinear from 2 to 4 pixels weighs with 1, 3/4, 1/4, 0 along a side. Where resizing came before the ReLU, the
    # negative neighbours would take from the positive one.
    attribution = torch.tensor([[1.0, -1.0], [-1.0, -7.0]])[None, None]
    side = torch.tensor([1.0, 0.75, 0.25, 0.0])
    assert torch.equal(heatmap(attribution, (4, 4)), (side[:, None] * side)[None, None])
    assert heatmap(attribution, (3, 5)).shape == (1, 1, 3, 5)


def test_a_heatmap_is_zero_where_the_attribution_is_negative(model, images):
    attribution = explain(half_masked(model, images), images, predicted_score(model)).maps["grad_cam"]
    for raw in attribution.values():
        same = heatmap(raw, raw.shape[-2:])
        assert torch.equal(same[raw > 0], raw[raw > 0])
        assert not same[raw <= 0].any()


def test_peak_by_hand():
    attribution = torch.tensor([[[[0.5, -9.0, 0.25]] * 2], [[[-1.0, -2.0, -3.0]] * 2]])  # 2 x 3
    assert peak(attribution).tolist() == [3.0, 0.0]


def test_correlation_by_hand():
    a = torch.tensor([[[[1.0, 2], [3, 4]]]] * 4)
    b = torch.stack([5 * a[0] + 3, -a[0], torch.tensor([[[-1.0, 1], [1, -1]]]), torch.ones(1, 2, 2)])
    assert correlation(a, b).tolist() == pytest.approx([1, -1, 0, 0])
    assert correlation(1e-30 * a, b).tolist() == pytest.approx([1, -1, 0, 0])


WRAPPERS = (nn.DataParallel, AveragedModel, torch.compile, lambda model: nn.DataParallel(ModelEmaV3(model)))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_model_in_the_wrapper_of_a_training_is_explained_as_the_model_itself(classifier, segmenter, images, wrap):
    segmenter.threshold = 0.3  # so that every picture has a mask
    for model in (classifier, segmenter):
        wrapped = wrap(model)
        logits, attribution = grad_cam(wrapped, images)
        assert attribution.equal(grad_cam(model, images)[1])
        assert predict(wrapped, images).equal(logits)
        assert default_stage(wrapped) == default_stage(model)
        ours, theirs = (explain(each, images, predicted_score(each)).maps["grad_cam"] for each in (wrapped, model))
        assert all(ours[stage].equal(theirs[stage]) for stage in theirs)
        assert judge(wrapped, images[:1], attribution[:1]) == judge(model, images[:1], attribution[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_told_what_to_do(classifier, images, dtype):
    half = classifier.to(dtype)
    for ask in (grad_cam, predict):
        with pytest.raises(ValueError, match=r"float\(\)"):
            ask(half, images)
