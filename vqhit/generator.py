"""What all generators share: noise that depends on a seed alone, sampling, interpolation."""

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from vqhit.card import ModelKind
from vqhit.hub import Pretrained
from vqhit.norms import in_eval_mode

_AT_A_TIME = 32


class Purpose(IntEnum):
    """What noise is drawn for: it keeps the draws of one seed apart."""

    SAMPLE = 0
    TRAINING_STEP = 1
    BATCH_NORM_STATISTICS = 2


def draw_noise(seed: int, purpose: Purpose, number: int, count: int, dim: int) -> Tensor:
    """Standard normal noise that depends on the seed, the purpose and the number alone: (count, dim) float32, CPU.

    All from 0. Raises `ValueError` for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    word = np.random.SeedSequence(seed, spawn_key=(purpose, number)).generate_state(1, np.uint64)[0]
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(int(word)))


def generator_kind(name: str, module: str, what: str) -> ModelKind:
    """What the cards of a class of generators say."""
    usage = f"""\
from {module} import {name}
from vqhit.images import to_uint8, uint8_to_pil

generator = {name}.from_pretrained(SOURCE)
images = generator.sample(4, seed=0)  # (4, 3, H, W) in [-1, 1]
for number, image in enumerate(to_uint8(images)):
    uint8_to_pil(image).save(f"sample_{{number}}.png")"""
    return ModelKind("unconditional-image-generation", ("gan", "image-generation"), what, usage)


class Generator(Pretrained):
    """A GAN generator: noise (B, D) -> images (B, 3, H, W), unclamped."""

    @property
    def latent_dim(self) -> int:
        """Length D of the noise vector."""
        return self.config.latent_dim

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.config.image_size

    def summary(self) -> dict[str, str]:
        """What the model is, for its card."""
        return {
            "Input": f"noise of {self.latent_dim} numbers, standard normal",
            "Output": f"images of {self.image_size}x{self.image_size} px, in [-1, 1]",
            **super().summary(),
        }

    def _images(self, z: Tensor) -> Tensor:
        """Images of noise of the right shape, (B, D) -> (B, 3, H, W)."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        """Noise (B, D) -> images (B, 3, H, W), unclamped; raises `ValueError` for noise of another shape."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z is {tuple(z.shape)}; this model takes (B, {self.latent_dim})")
        return self._images(z)

    def noise(self, indices: Iterable[int], *, seed: int = 0) -> Tensor:
        """Noise of the samples of these numbers, on the model's device: (N, D).

        Sample i of a seed is the same in any company. Raises `ValueError` for a negative seed.
        """
        rows = [draw_noise(seed, Purpose.SAMPLE, index, 1, self.latent_dim) for index in indices]
        return torch.cat([torch.empty(0, self.latent_dim), *rows]).to(next(self.parameters()))

    def sample(self, n: int, *, seed: int = 0, batch_size: int | None = None) -> Tensor:
        """Draw `n` images in eval mode: (n, 3, H, W), clamped to [-1, 1].

        Image i depends on the seed and on i. `batch_size` is how many pass at a time: it bounds memory, and moves
        values by rounding alone (about 1e-6). By default that is 1 on the CPU, where an image is then the same to the
        bit whatever `n` is, and 32 elsewhere. Raises `ValueError` for `n` or `batch_size` below 1, or a negative seed.
        """
        if n < 1:
            raise ValueError(f"n is {n}; allowed: 1 or more")
        return torch.cat(list(self.samples(range(n), seed=seed, batch_size=batch_size)))

    def samples(self, indices: Sequence[int], *, seed: int = 0, batch_size: int | None = None) -> Iterator[Tensor]:
        """Draw the images of these numbers, a batch at a time: (B, 3, H, W) each; otherwise as `sample`."""
        size = self._batch_size(batch_size)
        starts = range(0, len(indices), size)
        return (self._clamped(self.noise(indices[start : start + size], seed=seed)) for start in starts)

    def interpolate(self, z0: Tensor, z1: Tensor, steps: int = 8, batch_size: int | None = None) -> Tensor:
        """Images along the straight line from one noise vector to another, both ends included (Figure 7).

        Two (D,) -> (steps, 3, H, W), two (B, D) -> (B, steps, 3, H, W), clamped to [-1, 1], in eval mode. `batch_size`
        as for `sample`. Raises `ValueError` for other shapes, or fewer than 2 steps.
        """
        if steps < 2:
            raise ValueError(f"steps is {steps}; allowed: 2 or more")
        if z0.shape != z1.shape or z0.ndim not in (1, 2) or z0.shape[-1] != self.latent_dim:
            raise ValueError(
                f"z0 is {tuple(z0.shape)} and z1 {tuple(z1.shape)}; both must be ({self.latent_dim},) or "
                f"(B, {self.latent_dim})"
            )
        z0, z1 = (z.to(next(self.parameters())) for z in (z0, z1))
        weights = torch.linspace(0, 1, steps, dtype=z0.dtype, device=z0.device).unsqueeze(1)
        line = torch.lerp(z0.unsqueeze(-2), z1.unsqueeze(-2), weights)
        images = torch.cat([self._clamped(part) for part in line.flatten(0, -2).split(self._batch_size(batch_size))])
        return images.unflatten(0, line.shape[:-1])

    def _batch_size(self, given: int | None) -> int:
        if given is not None and given < 1:
            raise ValueError(f"batch_size is {given}; allowed: 1 or more")
        return given or (1 if next(self.parameters()).device.type == "cpu" else _AT_A_TIME)

    @torch.no_grad()
    def _clamped(self, z: Tensor) -> Tensor:
        with in_eval_mode(self):
            return self(z).clamp(-1, 1)
