"""cvlab.diagnose: planted faults are called by their names, and healthy models raise no alarm."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import (
    against,
    class_score,
    contrast_score,
    default_stage,
    explain,
    grad_cam,
    predict,
    predicted_score,
    region_score,
)
from cvlab.models import Stage, build
from cvlab.transforms import view
from cvlab.trust.diagnosis import diagnose, diagnose_model, score_map_correlation

ROOT = Path(__file__).resolve().parents[1]


def name_of(sentence):
    return sentence.split(":")[0]


# --- numbers alone ----------------------------------------------------------------------------------------------------

FINE = torch.tensor([[[[-1.0, 1, 0], [1, -1, 2], [2, 1, 0]]]])
SURE, WAVERING = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[1.0, 3.0, 3.1]])


@pytest.mark.parametrize(
    ("attribution", "logits", "name"),
    [
        (FINE, None, ""),
        (FINE, SURE, ""),
        (FINE, WAVERING, ""),  # about class 0, of which it is sure
        (FINE - 0.5, FINE.abs(), ""),
        (FINE * float("nan"), None, "Not finite"),
        (FINE * 0, None, "Blank"),
        (-FINE.abs(), None, "Blank"),
        (FINE[..., :2, :2], None, "Coarse"),
        (FINE * 0.001 + 3, None, "Flat"),
        (3 * FINE - 2, FINE, "Tautology"),
        (-3 * FINE + 2, FINE, "Inverted"),
        (torch.tensor([[[[-90.0, -60, -1], [-2, 1, -7], [-9, -8, -4]]]]), None, "Inverted"),
        (FINE, WAVERING.flip(1), "Unsure"),
    ],
)
def test_what_a_map_alone_shows(attribution, logits, name):
    assert name_of(diagnose(attribution, logits)) == name
    assert name_of(diagnose(attribution * 1e-9, logits)) == name  # whatever its scale


def test_score_map_correlation_by_hand():
    logits = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 0], [0, 9]]]])
    attribution = torch.tensor([[[[-1.0, 1], [1, -1]]]])
    assert score_map_correlation(logits[:, :1] * 5 + 3, logits) == pytest.approx(1)
    assert score_map_correlation(attribution, logits) == pytest.approx(0)
    assert score_map_correlation(logits[:, 1:], logits, 1) == pytest.approx(1)
    # At a coarser stage the logits are averaged over its cells.
    fine = logits[:, :1].repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert score_map_correlation(logits[:, :1], fine) == pytest.approx(1)


# --- healthy models: what the faults are planted in -------------------------------------------------------------------

COLORS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.9, 0.2], [0.2, 0.2, 0.9]])


def coloured_squares(count, seed):
    """Images (N, 3, 16, 16) of noise with a square in the colour of the label (N,), and its masks (N, 1, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 16, 16, generator=generator) * 0.5 + 0.25
    labels = torch.randint(0, 3, (count,), generator=generator)
    masks = torch.zeros(count, 1, 16, 16, dtype=torch.bool)
    for mask, (top, left) in zip(masks, torch.randint(0, 10, (count, 2), generator=generator).tolist(), strict=True):
        mask[0, top : top + 6, left : left + 6] = True
    return torch.where(masks, COLORS[labels][..., None, None], images), labels, masks


@cache
def trained(network, seed):
    """A tiny model after forty steps on coloured squares."""
    torch.manual_seed(seed)
    arguments = {"widths": [6, 12], "depth": 1} if network == "convnet" else {"width": 4, "depth": 2}
    model = build(network, ["red", "green", "blue"] if network == "convnet" else ["square"], 16, arguments)
    return fitted(model, seed)


def fitted(model, seed):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(40):
        images, labels, masks = coloured_squares(12, 1000 * seed + step)
        logits = model(images)
        is_class = logits.ndim == 2
        loss = (
            F.cross_entropy(logits, labels) if is_class else F.binary_cross_entropy_with_logits(logits, masks.float())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize(
    ("network", "stage"), [("convnet", "stage1"), ("convnet", "stage2"), ("unet", "bottleneck"), ("unet", "decoder2")]
)
def test_no_alarm_on_a_healthy_model(network, stage, seed):
    model = trained(network, seed)
    for image in coloured_squares(6, 999 + seed)[0].split(1):
        logits, attribution = grad_cam(model, image, stage=stage)
        if attribution.relu().sum() > 0.02 * attribution.abs().sum():  # less of a map is called inverted, rightly
            class_idx = int(logits.argmax()) if network == "convnet" else 0
            assert diagnose(attribution, logits, class_idx) == ""
            assert diagnose_model(model, image, stage=stage) == ""


@pytest.mark.parametrize("name", ["shapes-classifier", "shapes-segmenter"])
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_no_alarm_on_a_shipped_model(name, method):
    model = checkpoint.load(ROOT / "checkpoints" / name)
    for seed in range(3500, 3505):
        image = view(shapes.scene(seed, model.image_size).image, model)
        maps = explain(model, image, predicted_score(model), methods=[method]).maps[method]
        for stage, attribution in maps.items():
            found = name_of(diagnose_model(model, image, stage=stage, method=method))
            share = attribution.relu().sum() / attribution.abs().sum()
            if method == "grad_cam" and stage == "decoder1":
                assert found == "Tautology"
            elif share > 0.02:
                assert found == ""


# --- planted faults ---------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model with something between it and those who ask."""

    task = "classification"

    def __init__(self, inner, stages=None):
        super().__init__()
        self.inner, self.chosen = inner, stages

    @property
    def stages(self):
        return self.chosen or self.inner.stages

    def forward(self, images):
        return self.inner(images)


class FlattenHead(Wrapped):
    """Reads the same features in a head that has a weight for every position."""

    def __init__(self, inner):
        super().__init__(inner)
        self.head = nn.Linear(12 * 4 * 4, 3)

    def forward(self, images):
        x = self.inner.stem(self.inner.normalize(images))
        x = self.inner.blocks[1](F.max_pool2d(self.inner.blocks[0](x), 2))
        return self.head(x.flatten(1))


class NormHead(Wrapped):
    """Normalises the channels at each position before they are pooled, as ConvNeXt and Swin do."""

    def __init__(self, inner):
        super().__init__(inner)
        self.norm = nn.LayerNorm(12)

    def forward(self, images):
        x = self.inner.stem(self.inner.normalize(images))
        x = self.inner.blocks[1](F.max_pool2d(self.inner.blocks[0](x), 2))
        return self.inner.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))


class ClassToken(Wrapped):
    """A transformer of one block whose head reads the CLS token alone."""

    def __init__(self):
        super().__init__(None)
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    @property
    def stages(self):
        return {"block": Stage(self.block, lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))}

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.block(torch.cat([self.token.expand(len(images), -1, -1), tokens], 1))[:, 0])


class Shortcut(Wrapped):
    """A block scaled down by a LayerScale of 1e-7 beside the healthy network."""

    def __init__(self, inner):
        super().__init__(inner)
        self.block = nn.Conv2d(3, 4, 3, padding=1)

    @property
    def stages(self):
        return {"block": Stage(self.block)}

    def forward(self, images):
        return self.inner(images) + 1e-7 * self.block(images).mean((2, 3))[:, :3]


class Detached(Wrapped):
    """The second stage gets a detached copy of the first; another way leads past it."""

    def forward(self, images):
        x = self.inner.blocks[0](self.inner.stem(self.inner.normalize(images)))
        return self.inner.head(self.inner.blocks[1](F.max_pool2d(x, 2).detach()).mean((2, 3)))


def healthy(network="convnet"):
    return deepcopy(trained(network, 0))


def square(label=0):
    images, labels, _ = coloured_squares(24, 77)
    return images[labels == label][:1]


def dead_stage():
    model = healthy()
    nn.init.constant_(model.blocks[1][0].conv2[1].bias, -100.0)
    return model, square(), class_score(0), "stage2"


def detached_stage():
    return Detached(healthy()).eval(), square(), class_score(0), "stage1"


def only_the_class_token_is_read():
    torch.manual_seed(0)
    return ClassToken().eval(), square(), class_score(0), "block"


def all_evidence_is_negative():
    model = healthy()
    nn.init.constant_(model.head.weight[1], -1.0)
    nn.init.constant_(model.head.bias, 20.0)
    return model, square(), class_score(1), "stage2"


def wavers_between_two():
    model = healthy()
    with torch.no_grad():
        model.head.weight[1] = model.head.weight[0]
        model.head.bias[1] = model.head.bias[0] + 0.1
    return model, square(), class_score(1), "stage1"


def flatten_head():
    torch.manual_seed(0)
    return fitted(FlattenHead(healthy()), 0), square(), class_score(0), "stage2"


def two_by_two():
    return healthy(), F.interpolate(square(), size=8), class_score(0), "stage2"


def probability_of_a_sure_network():
    return healthy(), square(), lambda logits: (5 * logits).softmax(1)[:, 0], "stage2"


def train_mode():
    return healthy().train(), square(), class_score(0), "stage2"


def part_in_train_mode():
    model = healthy()
    model.blocks[1].train()
    return model, square(), class_score(0), "stage2"


def a_weight_is_nan():
    model = healthy()
    with torch.no_grad():
        model.blocks[0][0].conv1[0].weight[0, 0, 0, 0] = float("nan")
    return model, square(), class_score(0), "stage2"


def logits_overflow():
    model = healthy()
    with torch.no_grad():
        model.head.weight *= 3e38
    return model, square(), class_score(0), "stage2"


def normalised_twice():
    return healthy(), (square() - 0.5) / 0.25, class_score(0), "stage2"


def not_divided_by_255():
    return healthy(), square() * 255, class_score(0), "stage2"


def blank_image():
    return healthy(), torch.full((1, 3, 16, 16), 0.4), class_score(0), "stage2"


def last_decoder():
    model = healthy("unet")
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[4:9, 4:9] = True
    return model, square(), region_score(region), "decoder1"


def against_at_the_last_decoder():
    model, image, score, stage = last_decoder()
    return model, image, against(score), stage


def classes_that_differ_by_a_factor():
    model = healthy()
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[:1] * torch.tensor([[1.0], [0.6], [0.3]]))
        model.head.bias.zero_()
    return model, square(), class_score(0), "stage2"


def passed_by():
    return Shortcut(healthy()).eval(), square(), class_score(0), "block"


def saturated_units():
    model = healthy()
    model.blocks[1].append(nn.BatchNorm2d(12)).append(nn.Sigmoid())
    nn.init.constant_(model.blocks[1][1].bias, 30.0)
    nn.init.uniform_(model.head.weight, 0.1, 1.0)
    with torch.no_grad():
        model.head.weight[1:] *= -1
    return model.eval(), square(), class_score(0), "stage2"


FAULTS = [
    (dead_stage, "Dead stage"),
    (detached_stage, "No gradient"),
    (only_the_class_token_is_read, "No gradient"),
    (all_evidence_is_negative, "Blank"),
    (wavers_between_two, "Unsure"),
    (flatten_head, "Flatten head"),
    (two_by_two, "Coarse"),
    (probability_of_a_sure_network, "Saturated score"),
    (train_mode, "Train mode"),
    (part_in_train_mode, "Train mode"),
    (a_weight_is_nan, "Not finite"),
    (logits_overflow, "Not finite"),
    (normalised_twice, "Range"),
    (not_divided_by_255, "Range"),
    (blank_image, "Constant image"),
    (last_decoder, "Tautology"),
    (against_at_the_last_decoder, "Inverted"),
    (classes_that_differ_by_a_factor, "Same for every class"),
    (passed_by, "Tiny"),
    (saturated_units, "Flat"),
]


@pytest.mark.parametrize(("planted", "name"), FAULTS, ids=[planted.__name__ for planted, _ in FAULTS])
def test_a_planted_fault_is_named(planted, name):
    model, image, score, stage = planted()
    training = [module.training for module in model.modules()]
    assert name_of(diagnose_model(model, image, score, stage)) == name
    assert [module.training for module in model.modules()] == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hires_cam_below_a_layer_norm_is_nothing():
    model = fitted(NormHead(healthy()), 0)
    assert name_of(diagnose_model(model, square(), class_score(0), "stage2", "hires_cam")) == "Tiny"
    assert diagnose_model(model, square(), class_score(0), "stage2") == ""


def test_what_is_no_fault_is_not_named():
    # Each a step away from a fault above.
    model, image = healthy(), square()
    small = lambda logits: 1e-3 * class_score(0)(logits)  # noqa: E731  a small factor is no saturation
    assert diagnose_model(model, image, small) == ""
    wavering, image, _, stage = wavers_between_two()
    assert diagnose_model(wavering, image, contrast_score(0, 2), stage) == ""  # the answer to the question it raises
    flattening, image, score, stage = flatten_head()
    assert diagnose_model(flattening, image, score, stage, "hires_cam") == ""  # which keeps the positions
    assert diagnose_model(model, image, stage=default_stage(model)) == ""


def test_a_score_without_any_gradient_is_refused():
    model = healthy()
    with pytest.raises(ValueError, match="gradient"):
        explain(model, square(), lambda logits: predict(model, square()).amax(1))


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="stage9"):
        diagnose_model(healthy(), square(), stage="stage9")
    with pytest.raises(ValueError, match="empty"):
        diagnose_model(healthy("unet"), square(), region_score(torch.zeros(16, 16, dtype=torch.bool)))
