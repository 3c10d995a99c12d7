"""What keeps a learned codebook alive while it is trained: usage counts, running means, restart of dead codes."""

import torch
from torch import Tensor

from vqhit import distributed
from vqhit.quantizer import Quantizer, import_vector_quantize


class CodebookAverage:
    """Codes as running means of the latents that chose them (van den Oord et al. 2017, appendix A.1).

    m ← γ m + (1 - γ) Σz and N ← γ N + (1 - γ) n, e = m / N, with N smoothed. A code that has hardly been chosen of late
    stays where it was: the smoothing would pull it to zero.
    """

    def __init__(self, codebook: Tensor, decay: float) -> None:
        self.decay = decay
        self.counts = torch.ones(len(codebook), device=codebook.device, dtype=codebook.dtype)
        self.sums = codebook.detach().clone()

    @torch.no_grad()
    def update(self, codebook: Tensor, vectors: Tensor, tokens: Tensor) -> None:
        """Move the codes towards the latents (N, C) of all processes that chose them; tokens of any shape, N in all."""
        tokens, vectors = tokens.flatten(), vectors.to(self.sums)
        chosen = distributed.total(torch.bincount(tokens, minlength=len(codebook))).to(self.counts)
        sums = distributed.total(torch.zeros_like(self.sums).index_add_(0, tokens, vectors))
        self.counts.lerp_(chosen, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total, smoothing = self.counts.sum(), 1e-5
        smoothed = (self.counts + smoothing) / (total + len(codebook) * smoothing) * total
        alive = (self.counts > 100 * smoothing)[:, None]
        codebook.copy_(torch.where(alive, self.sums / smoothed[:, None], codebook))

    def move(self, rows: Tensor, vectors: Tensor) -> None:
        """Start the means of some codes anew, each at one vector (M, C)."""
        self.counts[rows] = 1
        self.sums[rows] = vectors.to(self.sums)


class CodebookUsage:
    """Counts how often each code is chosen over an epoch or an evaluation set."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, tokens: Tensor) -> None:
        """Add tokens of any shape."""
        self.counts += torch.bincount(tokens.flatten().cpu(), minlength=len(self.counts))

    def gather(self) -> "CodebookUsage":
        """Counts of all processes together."""
        together = CodebookUsage(len(self.counts))
        together.counts = distributed.total(self.counts.clone())
        return together

    @property
    def codes_used(self) -> int:
        """Number of codes chosen at least once."""
        return int((self.counts > 0).sum())

    @property
    def dead_codes(self) -> int:
        """Number of codes never chosen."""
        return len(self.counts) - self.codes_used

    @property
    def usage(self) -> float:
        """Share of the codebook chosen at least once, 0 to 1."""
        return self.codes_used / len(self.counts)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the code distribution: 1 (one code) to the codebook size (all equally often)."""
        probabilities = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(probabilities).sum().exp())


class DeadCodes:
    """Finds codes that no latent has chosen for `after` steps, and moves them onto latents that are there.

    Every code starts out dead, so that the first steps place the codebook among the latents. With several processes a
    latent of any of them counts, and all take the same ones, as one process with the whole batch would.
    """

    def __init__(self, codebook_size: int, after: int) -> None:
        self.after = after
        self.unused_steps = torch.full((codebook_size,), after, dtype=torch.int64)

    @torch.no_grad()
    def restart(self, codebook: Tensor, vectors: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Count one step with its latents (N, C) and tokens, N in all; returns the rows that were moved, (M,)."""
        used = distributed.total(torch.bincount(tokens.flatten(), minlength=len(codebook))).cpu() > 0
        self.unused_steps = torch.where(used, 0, self.unused_steps + 1)
        here, everywhere = len(vectors), len(vectors) * distributed.world_size()
        dead = (self.unused_steps > self.after).nonzero().flatten()[:everywhere]
        chosen = torch.randperm(everywhere, generator=generator)[: len(dead)] - here * distributed.rank()
        mine = ((chosen >= 0) & (chosen < here))[:, None].to(vectors.device)
        found = distributed.total(torch.where(mine, vectors[chosen.clamp(0, here - 1).to(vectors.device)], 0))
        codebook[dead.to(codebook.device)] = found.to(codebook.dtype)
        self.unused_steps[dead] = 0
        return dead.to(codebook.device)


class CodebookTraining:
    """All that happens to a learned codebook after each step: running means if it has them, then restarts.

    `restart_after` is the number of steps after which an unused code moves; 0 never moves one.
    """

    def __init__(self, quantizer: Quantizer, restart_after: int, seed: int) -> None:
        self.quantizer, self.codebook, self.seed = quantizer, quantizer.codebook, seed
        config = quantizer.config
        if config.gradient == "rotation_trick":  # needed for gradients only: find out before the first one
            import_vector_quantize()
        self.average = CodebookAverage(self.codebook, config.ema_decay) if config.update == "ema" else None
        self.dead_codes = DeadCodes(config.codebook_size, restart_after)

    @torch.no_grad()
    def update(self, latents: Tensor, tokens: Tensor, step: int) -> Tensor:
        """Take in the latents (B, C, h, w) and tokens of a batch; returns the rows that were moved, (M,)."""
        vectors = self.quantizer.vectors(latents)
        if self.average is not None:
            self.average.update(self.codebook, vectors, tokens)
        if not self.dead_codes.after:
            return torch.empty(0, dtype=torch.int64)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        moved = self.dead_codes.restart(self.codebook, vectors, tokens, generator)
        if self.average is not None:
            self.average.move(moved, self.codebook[moved])
        return moved

    def begin_trained(self) -> None:
        """The codebook is a trained one: no code counts as dead, and its running means begin at the codes."""
        self.dead_codes.unused_steps.zero_()
        if self.average is not None:
            self.average = CodebookAverage(self.codebook, self.average.decay)

    def load_means(self, state: dict[str, Tensor]) -> bool:
        """Take the running means of another run's `state_dict`, if both keep any; raises `ValueError` for others."""
        counts, sums = state.get("code_counts"), state.get("code_sums")
        if self.average is None or counts is None or sums is None:
            return False
        if (counts.shape, sums.shape) != (self.average.counts.shape, self.average.sums.shape):
            raise ValueError(f"running means of codes are {tuple(sums.shape)}; these are {tuple(self.codebook.shape)}")
        self.average.counts, self.average.sums = counts.to(self.codebook.device), sums.to(self.codebook.device)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a continued run needs, by name."""
        state = {"unused_steps": self.dead_codes.unused_steps}
        if self.average is not None:
            state |= {"code_counts": self.average.counts, "code_sums": self.average.sums}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.dead_codes.unused_steps = state["unused_steps"]
        if self.average is not None:
            self.average.counts = state["code_counts"].to(self.codebook.device)
            self.average.sums = state["code_sums"].to(self.codebook.device)
