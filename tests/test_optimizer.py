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
    with pytest.raises(ValueError, match=r"Sequential: the gradient of 1\.bias is not finite"):
        adam.gradient_norm()


def test_reset_rows_have_no_momentum_and_the_scale_of_all_rows():
    adam = optimizer(beta1=0.5, beta2=0.999)
    train(adam, (0, 20))
    weight = adam.module[0].weight
    state = adam.adam.state[weight]
    mean, kept = state["exp_avg_sq"].mean(0), state["exp_avg"][[0, 2]].clone()
    adam.reset_rows(weight, torch.tensor([1, 3]))
    assert not state["exp_avg"][[1, 3]].any()
    assert torch.equal(state["exp_avg"][[0, 2]], kept)
    assert torch.equal(state["exp_avg_sq"][[1, 3]], mean.expand(2, -1))


def test_the_next_step_of_a_reset_row_is_no_longer_than_its_gradient_deserves():
    weight = nn.Parameter(torch.zeros(4, 3))
    module = nn.ParameterDict({"codes": weight})
    adam = Optimizer(module, OptimizerConfig(learning_rate=1e-3), 100)
    for step in range(50):
        weight.grad = torch.ones(4, 3)
        adam.step(step)
    adam.reset_rows(weight, torch.tensor([2]))
    before = weight.detach().clone()
    weight.grad = torch.ones(4, 3)
    adam.step(50)
    assert (before - weight.detach())[2].tolist() == pytest.approx([1e-3] * 3, rel=1e-3)  # zeroed: ten times that


def test_a_module_that_starts_late_warms_up_from_its_start():
    late = Optimizer(nn.Linear(1, 1), OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=2), 10, 4)
    whole = Optimizer(nn.Linear(1, 1), OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=2), 6)
    assert late.learning_rate(3) == 0
    assert [late.learning_rate(step) for step in range(4, 10)] == [whole.learning_rate(step) for step in range(6)]


def test_frozen_parameters_are_left_alone():
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    module.bias.requires_grad_(False)
    assert list(Optimizer(module, OptimizerConfig(), 1).parameters) == ["weight"]
