"""Schedules against their closed forms, and what optimizers and the timing of precisions leave alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerator import fastest_precision
from torch import Tensor, nn

from cvlab.learning.optim import OPTIMIZERS, SCHEDULES, optimizer, schedule


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 2)
    )


def rates(name: str, steps: int, lr: float, **arguments: float) -> list[float]:
    """The learning rate of every step."""
    sgd = optimizer("sgd", small_network(), lr)
    scheduler = schedule(name, sgd, steps, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(sgd.param_groups[0]["lr"])
        assert all(group["lr"] == seen[-1] for group in sgd.param_groups)
        sgd.step()
        scheduler.step(*[1.0] * (name == "plateau"))
    return seen


def test_onecycle_is_two_half_cosines() -> None:
    steps, lr = 100, 0.4
    seen = rates("onecycle", steps, lr)
    start, peak, end = lr / 25, lr, lr / 25 / 10_000
    assert seen[0] == pytest.approx(start)
    assert seen[29] == pytest.approx(peak)
    assert seen[99] == pytest.approx(end, abs=1e-9)
    for step, rate in enumerate(seen):
        before, after, part = (start, peak, step / 29) if step <= 29 else (peak, end, (step - 29) / 70)
        assert rate == pytest.approx(after + (before - after) * (1 + math.cos(math.pi * part)) / 2)


def test_onecycle_leaves_the_momentum() -> None:
    sgd = optimizer("sgd", small_network(), 0.1, momentum=0.8)
    scheduler = schedule("onecycle", sgd, 10)
    for _ in range(9):
        sgd.step()
        scheduler.step()
        assert all(group["momentum"] == 0.8 for group in sgd.param_groups)


def test_onecycle_starts_at_the_rate_divided_by_its_factor() -> None:
    """The deep network of Caltech-256: from 0.01 to a peak of 0.1 at 30% of 20 epochs."""
    seen = rates("onecycle", 20 * 50, 0.1, steps_per_epoch=50, div_factor=10)
    assert seen[0] == pytest.approx(0.01)
    assert seen.index(max(seen)) == 299
    assert max(seen) == pytest.approx(0.1)


def test_step_takes_a_tenth_every_ten_epochs() -> None:
    seen = rates("step", 30 * 4, 0.01, steps_per_epoch=4)
    assert seen == pytest.approx([0.01] * 40 + [0.001] * 40 + [0.0001] * 40)


def test_cosine_falls_to_zero_from_the_first_step_on() -> None:
    expected = [0.2 * (1 + math.cos(math.pi * step / 50)) / 2 for step in range(50)]
    assert rates("cosine", 50, 0.2) == pytest.approx(expected)


def test_plateau_takes_a_tenth_after_ten_epochs_without_a_smaller_loss() -> None:
    sgd = optimizer("sgd", small_network(), 0.1)
    scheduler = schedule("plateau", sgd, steps=100)
    seen = []
    for loss in [3.0, 2.0] + [2.0] * 11 + [1.0]:
        for _ in range(5):  # a batch has no validation loss
            sgd.step()
            scheduler.step()
        scheduler.step(loss)
        seen.append(sgd.param_groups[0]["lr"])
    assert seen == pytest.approx([0.1] * 12 + [0.01] * 2)


def test_constant_is_constant() -> None:
    assert rates("constant", 20, 0.3) == [0.3] * 20


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_take_trainings_of_few_steps(name: str) -> None:
    for steps in (1, 2, 3):
        assert all(0 <= rate <= 0.1 + 1e-9 for rate in rates(name, steps, 0.1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_factors_of_normalisation_are_not_decayed(name: str) -> None:
    model = small_network()
    groups = optimizer(name, model, lr=0.1, weight_decay=0.5).param_groups
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0.5}
    spared = {id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0.0}
    assert decayed == {id(model[0].weight), id(model[5].weight)}
    assert spared == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[5].bias)}
    assert all(group["lr"] == 0.1 for group in groups)


def test_everything_is_decayed_where_that_is_asked_for() -> None:
    model = small_network()
    groups = optimizer("sgd", model, lr=0.1, weight_decay=0.5, decay="all").param_groups
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    assert all(group["weight_decay"] == 0.5 for group in groups if group["params"])


def test_decay_pulls_weights_and_nothing_else() -> None:
    """One step of SGD without gradients: weights times 1 - lr * decay."""
    model = small_network()
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer("sgd", model, lr=0.1, weight_decay=0.5, momentum=0.0).step()
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter, old * 0.95 if old.ndim > 1 else old)


def test_frozen_parameters_are_left_out() -> None:
    model = small_network()
    model[0].requires_grad_(False)
    held = [p for group in optimizer("adamw", model, lr=0.1).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for layer in (model[1], model[5]) for p in layer.parameters()}


def test_sgd_is_torch_s_and_nesterov_looks_ahead() -> None:
    """With gradient and rate 1 and momentum m two steps go 1 + (1 + m), Nesterov's (1 + m) + (1 + m + m^2)."""
    moved = {}
    for name in ("sgd", "nesterov"):
        model = nn.Linear(1, 1, bias=False)
        start, steps = model.weight.item(), optimizer(name, model, lr=1.0, momentum=0.5)
        for _ in range(2):
            model.weight.grad = torch.ones(1, 1)
            steps.step()
        moved[name] = start - model.weight.item()
    assert moved == pytest.approx({"sgd": 2.5, "nesterov": 3.25})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    model, images = nn.Linear(4, 1), torch.randn(32, 4)
    wanted = images.sum(1, keepdim=True)
    steps = optimizer(name, model, lr=0.02)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(images), wanted)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("training", [True, False])
def test_fastest_precision_leaves_no_trace(training: bool) -> None:
    model = small_network().train(training)
    model[5].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    state = copy.deepcopy(model.state_dict())
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 2
    numbers = torch.get_rng_state()

    def criterion(logits: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        return F.cross_entropy(logits, labels)

    assert fastest_precision(model, images, criterion, repeats=1) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.training is training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert (model[0].weight.grad == 3).all()
    assert all(p.grad is None for p in model.parameters() if p is not model[0].weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_optimizer_makes_the_same_steps(name: str) -> None:
    weights = []
    for fused in (False, True):
        network = small_network().eval()
        made = optimizer(name, network, 0.01, weight_decay=0.1, fused=fused)
        for seed in range(3):
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            network(images).square().sum().backward()
            made.step()
            made.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert (weights[0] - torch.cat([p.detach().flatten() for p in small_network().parameters()])).abs().max() > 0.01
