"""The average of weights and buffers."""

import pytest
import torch
from torch import nn

from vqhit.ema import EMA, EMAConfig


def model_with(value):
    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        for tensor in (model.weight, model.bias, model.running_mean, model.running_var):
            tensor.fill_(value)
    return model


def test_it_copies_up_to_the_start_and_averages_after_it():
    ema = EMA(model_with(0.0), EMAConfig(decay=0.9, start_step=2))
    for step, value in ((1, 1.0), (2, 3.0)):
        ema.update(model_with(value), step)
        assert ema.model.weight[0] == value
    ema.update(model_with(5.0), 3)
    for tensor in (ema.model.weight, ema.model.running_mean, ema.model.running_var):  # weights and buffers
        assert tensor[0].item() == pytest.approx(0.9 * 3 + 0.1 * 5)


def test_counters_are_copied():
    model = model_with(1.0)
    ema = EMA(model, EMAConfig(decay=0.9, start_step=0))
    model.num_batches_tracked.fill_(7)
    ema.update(model, 1)
    assert int(ema.model.num_batches_tracked) == 7


def test_warm_up_bounds_the_decay():
    ema = EMA(model_with(0.0), EMAConfig(decay=0.999, start_step=10, warmup=True))
    assert [ema.decay(step) for step in (5, 10, 11, 20)] == pytest.approx([0, 0, 2 / 11, 11 / 20])
    assert ema.decay(100_000) == 0.999
    assert EMA(model_with(0.0), EMAConfig()).decay(11) == 0.999


def test_the_average_is_a_model_in_eval_mode_without_gradients():
    ema = EMA(model_with(0.0).train(), EMAConfig())
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
