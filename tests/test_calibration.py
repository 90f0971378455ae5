"""cvlab.calibration against counts by hand and closed forms."""

import math

import numpy as np
import pytest
import torch

from cvlab.metrics import expected_calibration_error, fit_temperature, reliability

PROBS = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55], [0.6, 0.4]])
LABELS = torch.tensor([0, 1, 1, 1, 1])  # right, wrong, right, right, wrong


def test_reliability_by_hand() -> None:
    table = reliability(PROBS, LABELS, bins=4)  # up to .25, .5, .75, 1
    expected = [[0, 0, 0], [0, 0, 0], [(0.7 + 0.55 + 0.6) / 3, 2 / 3, 3], [0.85, 1 / 2, 2]]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    error = 3 / 5 * (2 / 3 - 1.85 / 3) + 2 / 5 * (0.85 - 0.5)
    assert expected_calibration_error(PROBS, LABELS, bins=4) == pytest.approx(error, abs=1e-6)


def test_a_model_that_is_as_often_right_as_it_says_has_no_calibration_error() -> None:
    probs = torch.tensor([[0.8, 0.2]] * 10 + [[0.4, 0.6]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 8 + [1] * 2 + [1] * 6 + [0] * 4)
    assert expected_calibration_error(probs, labels) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("logit", [0.5, 1.0, 6.0])
def test_fit_temperature_finds_the_closed_form(logit: float) -> None:
    """Right 8 times of 10 with one logit: the best probability is 0.8, so logit / T = ln 4."""
    logits = torch.tensor([[logit, 0.0]] * 10)
    assert fit_temperature(logits, torch.tensor([0] * 8 + [1] * 2)) == pytest.approx(logit / math.log(4), rel=1e-3)
