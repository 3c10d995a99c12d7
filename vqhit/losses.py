"""Losses: tensors to scalars."""

import torch.nn.functional as F
from torch import Tensor

from vqhit.config import Config, NonNegative


class LossConfig(Config):
    """Weights of the terms of the tokenizer's loss (appendix A.5, eq. 5)."""

    reconstruction: NonNegative = 1.0
    codebook: NonNegative = 1.0


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """‖x - x̂‖² of eq. 5, the mean over all elements: two (B, 3, H, W) in [-1, 1] -> scalar."""
    return F.mse_loss(reconstruction, images)
