"""The exponential moving average of a model: the weights that are evaluated, saved and published."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vqhit.config import Config, Decay, Flag, NonNegativeInt


class EMAConfig(Config):
    """Decay of the average; the official HiT-GAN code's by default. 0 keeps no average."""

    decay: Decay = 0.999
    start_step: NonNegativeInt = 10
    """The average is a copy of the model up to this step."""
    warmup: Flag = False
    """Bound the decay by (1 + t) / (10 + t), t steps after the start: for runs that are short beside 1/(1 - decay)."""


M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Average of all weights and buffers, moving statistics included, as a model of its own in eval mode."""

    def __init__(self, model: M, config: EMAConfig) -> None:
        self.config = config
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)

    def decay(self, step: int) -> float:
        """Weight of the past in the update that follows step `step`, counted from 1."""
        since = step - self.config.start_step
        if since <= 0:
            return 0.0
        return min(self.config.decay, (1 + since) / (10 + since)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model` after its step `step`; whole numbers (counters) are copied."""
        decay = self.decay(step)
        for average, value in zip(_tensors(self.model), _tensors(model), strict=True):
            if average.is_floating_point() and decay:
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
