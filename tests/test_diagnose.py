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
    explain,
    grad_cam,
    predict,
    predicted_score,
    region_score,
)
from cvlab.models import Stage, build
from cvlab.transforms import view
from cvlab.trust.diagnosis import diagnose

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


def test_a_map_is_compared_with_the_logits_of_its_own_class_at_its_own_resolution():
    logits = torch.cat([FINE, FINE.flip(2)], 1)
    assert name_of(diagnose(logits[:, :1] * 5 + 3, logits)) == "Tautology"
    assert name_of(diagnose(logits[:, :1] * 5 + 3, logits, 1)) == ""
    assert name_of(diagnose(logits[:, 1:], logits, 1)) == "Tautology"
    # At a coarser stage the logits are averaged over its cells.
    fine = logits.repeat_interleave(3, 2).repeat_interleave(3, 3)
    fine[..., ::3, ::3] += 9
    assert name_of(diagnose(logits[:, :1], fine)) == "Tautology"


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


@pytest.mark.parametrize("name", ["shapes-classifier", "shapes-segmenter"])
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_no_alarm_on_a_shipped_model(name, method):
    model = checkpoint.load(ROOT / "checkpoints" / name)
    for seed in range(3500, 3505):
        image = view(shapes.scene(seed, model.image_size).image, model)
        explanation = explain(model, image, predicted_score(model), methods=[method])
        class_idx = int(explanation.logits.argmax()) if model.task == "classification" else 0
        for stage, attribution in explanation.maps[method].items():
            found = name_of(diagnose(attribution, explanation.logits / model.temperature, class_idx))
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


def two_by_two():
    return healthy(), F.interpolate(square(), size=8), class_score(0), "stage2"


def last_decoder():
    model = healthy("unet")
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[4:9, 4:9] = True
    return model, square(), region_score(region), "decoder1"


def against_at_the_last_decoder():
    model, image, score, stage = last_decoder()
    return model, image, against(score), stage


def saturated_units():
    model = healthy()
    model.blocks[1].append(nn.BatchNorm2d(12)).append(nn.Sigmoid())
    nn.init.constant_(model.blocks[1][1].bias, 30.0)
    nn.init.uniform_(model.head.weight, 0.1, 1.0)
    with torch.no_grad():
        model.head.weight[1:] *= -1
    return model.eval(), square(), class_score(0), "stage2"


FAULTS = [
    (dead_stage, "Blank"),
    (detached_stage, "Blank"),
    (only_the_class_token_is_read, "Blank"),
    (all_evidence_is_negative, "Blank"),
    (wavers_between_two, "Unsure"),
    (two_by_two, "Coarse"),
    (last_decoder, "Tautology"),
    (against_at_the_last_decoder, "Inverted"),
    (saturated_units, "Flat"),
]


@pytest.mark.parametrize(("planted", "name"), FAULTS, ids=[planted.__name__ for planted, _ in FAULTS])
def test_a_planted_fault_is_named(planted, name):
    model, image, score, stage = planted()
    explanation = explain(model, image, score, [stage])
    assert name_of(diagnose(explanation.maps["grad_cam"][stage], explanation.logits)) == name


def test_a_score_without_any_gradient_is_refused():
    model = healthy()
    with pytest.raises(ValueError, match="gradient"):
        explain(model, square(), lambda logits: predict(model, square()).amax(1))
