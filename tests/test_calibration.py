"""How sure a model may be: the temperature that is fitted on val, kept in the folder, and used everywhere."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from calibration import PIXELS, answers, calibrate
from measure import add_calibration
from runs import SMALL_CLASSIFIER, colours, discs, here, noise
from scipy.optimize import minimize_scalar

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.data.evaluation import parts_of, read_views
from cvlab.explain import predict, predicted_masks
from cvlab.metrics import fit_temperature
from cvlab.models import build, probabilities
from cvlab.transforms import resize_logits


def test_temperature_of_pixels_finds_the_closed_form() -> None:
    """4 of 5 pixels with the logit 3 are in the mask: sigmoid(3 / T) is 0.8 where 3 / T is log 4."""
    assert fit_temperature(torch.full((50,), 3.0), torch.arange(50) % 5 > 0) == pytest.approx(3 / math.log(4), rel=1e-3)


def test_temperature_is_the_one_that_scipy_finds_by_golden_section() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(300, 4, generator=generator)
    labels = torch.distributions.Categorical(logits=logits / 3).probs.multinomial(1, generator=generator)[:, 0]

    def loss(log_t: float) -> float:
        rows = logits.double().numpy() / math.exp(log_t)
        picked = rows[range(300), labels.numpy()]
        return float((torch.logsumexp(torch.from_numpy(rows), 1).numpy() - picked).mean())

    expected = math.exp(minimize_scalar(loss, bracket=(-1.0, 2.0), method="golden").x)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-3)
    assert expected == pytest.approx(3, rel=0.2)  # by which the labels were drawn


def test_where_every_prediction_is_right_no_temperature_fits() -> None:
    assert fit_temperature(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])) == 1


def test_probabilities_by_hand() -> None:
    model = build("convnet", ["a", "b"], 16, {"widths": [4]})
    model.temperature = 2.0
    logits = torch.tensor([[math.log(9.0), 0.0]])
    assert probabilities(model, logits).tolist() == [pytest.approx([0.75, 0.25])]  # the square root of 9 is 3
    unet = build("unet", ["a"], 16, {"width": 4, "depth": 2}, threshold=0.6)
    unet.temperature = 2.0
    logits = torch.tensor([math.log(9.0), math.log(2.0)]).view(1, 1, 1, 2)
    assert probabilities(unet, logits).flatten().tolist() == pytest.approx([0.75, 2**0.5 / (1 + 2**0.5)])
    assert predicted_masks(unet, logits).flatten().tolist() == [True, False]  # .586, which was .667


def test_a_folder_keeps_its_temperature_and_its_logits(tmp_path: Path) -> None:
    """Noise, of which no network knows the class: the more even the probabilities, the better."""
    data = noise(tmp_path / "noise", "abc", each=20)
    torch.manual_seed(0)
    fresh = build("convnet", ["a", "b", "c"], 32, {"widths": [8]})
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter *= 2
    checkpoint.save(fresh, tmp_path / "model")
    before = checkpoint.load(tmp_path / "model")
    parts, _ = parts_of(before, data, "val")
    calibrate(tmp_path / "model", parts)
    after = checkpoint.load(tmp_path / "model")
    views, labels = read_views(parts, "val", before)
    logits, truth = answers(after, views, labels)
    assert logits.equal(answers(before, views, labels)[0])
    losses = [F.nll_loss(probabilities(each, logits).log(), truth).item() for each in (before, after)]
    assert losses[1] <= losses[0]
    checkpoint.save(after, tmp_path / "again")
    assert checkpoint.load(tmp_path / "again").temperature == after.temperature


def test_a_report_tells_the_error_before_and_after() -> None:
    """With the logit 3 a model is 95% sure, and at temperature 3 73%; it is right in 3 of 4."""
    model = build("convnet", ["a", "b"], 16, {"widths": [4]})
    for logits in (torch.tensor([[3.0, 0.0]] * 4), torch.full((4,), -3.0)):
        found, labels = {}, torch.tensor([0, 0, 0, 1])
        model.temperature = model.config["temperature"] = 3.0
        add_calibration(found, model, logits, labels)
        assert found["expected_calibration_error"] == pytest.approx(1 / (1 + math.exp(-3)) - 0.75)
        assert found["expected_calibration_error_at_temperature"] == pytest.approx(0.75 - 1 / (1 + math.exp(-1)))
    del model.config["temperature"]
    add_calibration(uncalibrated := {}, model, logits, labels)
    assert list(uncalibrated) == ["expected_calibration_error"]


@pytest.mark.parametrize("value", [0, -1, 1000, "2", True, math.nan, math.inf])
def test_a_temperature_beyond_its_limits_is_refused(tmp_path: Path, value: object) -> None:
    model = build("convnet", ["a", "b"], 16, {"widths": [4]})
    checkpoint.save(model, tmp_path)
    checkpoint.annotate(tmp_path, temperature=value)
    with pytest.raises(CheckpointError, match="temperature"):
        checkpoint.load(tmp_path)
    checkpoint.save(model, tmp_path)
    assert checkpoint.load(tmp_path).temperature == 1


def test_pixels_are_drawn_with_their_own_truth() -> None:
    """The true mask is where the logits, at its own size, are above their median."""
    torch.manual_seed(0)
    unet = build("unet", ["a", "b"], 16, {"width": 4, "depth": 2}).eval()
    views = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    resized = [resize_logits(predict(unet, view[None] / 255), (40, 30))[0] for view in views]
    middle = torch.stack(resized).median()
    masks = [each > middle for each in resized]
    logits, truth = answers(unet, views, masks)
    assert logits.shape == truth.shape == (3 * PIXELS,)
    assert truth.equal(logits > middle)
    assert 0 < truth.double().mean() < 1


def test_a_training_fits_the_temperature(tmp_path: Path) -> None:
    """Every fifth picture lies in the folder of the other class, so that no network can be sure."""
    data = colours(tmp_path / "data")
    for i in range(0, 30, 5):
        for name, other in (("red", "blue"), ("blue", "red")):
            (data / name / f"{i}.png").rename(data / other / f"other-{i}.png")
    here("classifier", *SMALL_CLASSIFIER, "--data", data, "--out", tmp_path / "run")
    model = checkpoint.load(tmp_path / "run")
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    parts, _ = parts_of(model, data, "val")
    calibrate(tmp_path / "run", parts)
    assert checkpoint.load(tmp_path / "run").temperature == model.temperature != 1
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept
    logits, truth = answers(model, *read_views(parts, "val", model))
    assert F.nll_loss(probabilities(model, logits).log(), truth) < F.cross_entropy(logits, truth)


def test_a_threshold_follows_the_temperature_so_that_masks_stay(tmp_path: Path) -> None:
    """The threshold is the one that 40% of the pixels exceed."""
    data = discs(tmp_path / "data")
    torch.manual_seed(0)
    unet = build("unet", ["disc"], 32, {"width": 4, "depth": 2}).eval()
    checkpoint.save(unet, tmp_path / "model")
    parts, _ = parts_of(unet, data, "val")
    views, _ = read_views(parts, "val", unet)
    with torch.no_grad():  # sigmoid(-2.5 / T) is the share of the discs, an eighth, at T = 1.3
        unet.head.bias -= 2.5 + predict(unet, views / 255).mean()
    logits = predict(unet, views / 255)
    unet.threshold = logits.flatten()[:8192].quantile(0.6).sigmoid().item()
    checkpoint.save(unet, tmp_path / "model")
    after = calibrate(tmp_path / "model", parts)
    assert after.temperature == pytest.approx(1.3, abs=0.15)
    assert abs(after.threshold - unet.threshold) > 0.01
    same = predicted_masks(after, logits) == predicted_masks(unet, logits)
    assert same.float().mean() > 0.999
    assert 0.3 < predicted_masks(after, logits).float().mean() < 0.5
