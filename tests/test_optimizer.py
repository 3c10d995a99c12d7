"""Adam by parameter name: schedules, norms, state."""

import math

import pytest
import torch
from torch import nn

from vqhit.optimizer import Optimizer, OptimizerConfig


def optimizer(steps=6, **config):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return Optimizer(module, OptimizerConfig(learning_rate=1e-3, **config), steps)


def train(optimizer, steps):
    for step in range(*steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        optimizer.module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step(step)


def test_learning_rate_schedules():
    constant = optimizer(warmup_steps=2)
    assert [constant.learning_rate(step) for step in range(4)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    cosine = optimizer(schedule="cosine", warmup_steps=2)
    expected = [5e-4, 1e-3, *(1e-3 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4))]
    assert [cosine.learning_rate(step) for step in range(6)] == pytest.approx(expected)


def test_the_state_continues_exactly():
    whole, first, second = (optimizer(beta1=0.5, schedule="cosine") for _ in range(3))
    train(whole, (0, 6))
    train(first, (0, 3))
    second.module.load_state_dict(first.module.state_dict())
    second.load_state_dict(first.state_dict())
    train(second, (3, 6))
    for (name, ours), theirs in zip(second.module.named_parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_gradient_norm_is_that_of_all_gradients_and_names_a_bad_one():
    adam = optimizer()
    adam.module(torch.randn(5, 3)).sum().backward()
    every = torch.cat([parameter.grad.flatten() for parameter in adam.module.parameters()])
    assert adam.gradient_norm() == pytest.approx(float(every.norm()))
    adam.module[1].bias.grad[0] = math.nan
    with pytest.raises(ValueError, match=r"the gradient of 1\.bias is not finite"):
        adam.gradient_norm()


def test_forgotten_rows_have_no_past():
    adam = optimizer(beta1=0.5)
    train(adam, (0, 2))
    weight = adam.module[0].weight
    adam.forget(weight, torch.tensor([1, 3]))
    for average in ("exp_avg", "exp_avg_sq"):
        state = adam.adam.state[weight][average]
        assert not state[[1, 3]].any()
        assert state[[0, 2]].any()


def test_frozen_parameters_are_left_alone():
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    module.bias.requires_grad_(False)
    assert list(Optimizer(module, OptimizerConfig(), 1).parameters) == ["weight"]
