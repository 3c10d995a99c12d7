"""Adam, its learning rate as a function of the step, and its state by parameter name."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vqhit import distributed
from vqhit.config import Config, Decay, NonNegativeInt, Positive


class OptimizerConfig(Config):
    """Adam, with the paper's settings as defaults (appendix A.5).

    Departure: the official code's Keras adds its epsilon, 1e-7, outside the bias correction, torch 1e-8 inside. Updates
    differ where gradients are below about 1e-5, in the first steps.
    """

    learning_rate: Positive = 1e-4
    beta1: Decay = 0.0
    beta2: Decay = 0.99
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to zero over the run's steps."""
    warmup_steps: NonNegativeInt = 0


class Optimizer:
    """Adam over the trainable parameters of a module that is trained from `first_step` up to `steps`."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, steps: int, first_step: int = 0) -> None:
        self.module, self.config = module, config
        self.first_step, self.trained_steps = first_step, steps - first_step
        self.parameters = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        self.adam = torch.optim.Adam(
            self.parameters.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2)
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate after `step` steps of the run: 0 before the start, linear warm-up, then constant or cosine."""
        rate, warmup, step = self.config.learning_rate, self.config.warmup_steps, step - self.first_step
        if step < 0:
            return 0.0
        if step < warmup:
            return rate * (step + 1) / warmup
        if self.config.schedule == "cosine":
            done = (step - warmup) / max(1, self.trained_steps - warmup)
            return rate * 0.5 * (1 + math.cos(math.pi * done))
        return rate

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def average_gradients(self) -> None:
        """Average the gradients over all processes: one flat all-reduce."""
        distributed.average_gradients(self.parameters.values())

    def gradient_norm(self) -> float:
        """Norm over all gradients; raises `ValueError` that names a parameter whose gradient is not finite."""
        norms = {name: p.grad.norm() for name, p in self.parameters.items() if p.grad is not None}
        total = float(torch.stack(list(norms.values())).norm()) if norms else 0.0
        if not math.isfinite(total):
            bad = [name for name, norm in norms.items() if not torch.isfinite(norm)]
            what = f"the gradient of {bad[0]} is not finite" if bad else "the norm of the gradient is out of range"
            raise ValueError(f"{type(self.module).__name__}: {what}")
        return total

    def step(self, step: int) -> None:
        """Update the parameters with the learning rate after `step` steps."""
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adam.step()

    def reset_rows(self, parameter: Tensor, rows: Tensor) -> None:
        """Forget the past of some rows of a parameter: no momentum, and the mean squared gradient of all rows.

        A squared gradient of zero would make their next step many times the learning rate: Adam corrects its bias by
        the age of the parameter, not of the row.
        """
        if state := self.adam.state.get(parameter):
            state["exp_avg"][rows] = 0
            state["exp_avg_sq"][rows] = state["exp_avg_sq"].mean(0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return Adam's state by parameter name: `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`."""
        return {
            f"{name}/{key}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.adam.state.get(parameter, {}).items()
        }

    def load_fitting(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take over the state of another run's optimizer; raises `ValueError` if it is not of these parameters."""
        expected = {f"{name}/{key}" for name in self.parameters for key in ("step", "exp_avg", "exp_avg_sq")}
        if tensors and (different := sorted(expected.symmetric_difference(tensors))):
            raise ValueError(f"{source}: not the state of these parameters ({different[0]} is in one only)")
        for name, parameter in self.parameters.items():
            if tensors and (shape := tensors[f"{name}/exp_avg"].shape) != parameter.shape:
                raise ValueError(f"{source}: {name} is {tuple(shape)}; here it is {tuple(parameter.shape)}")
        self.load_state_dict(tensors)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        state = self.adam.state_dict()
        state["state"] = {
            index: {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, name in enumerate(self.parameters)
            if f"{name}/step" in tensors
        }
        self.adam.load_state_dict(state)
