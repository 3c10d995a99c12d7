"""The inception score from sums: one pass, constant memory, many processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqhit import distributed

GROUPS = 10
"""Of 5,000 images each, of the usual 50,000. Also the least number of images that has a score."""
_SEED = 2020


class InceptionScore:
    """exp of the mean of KL(p(y|x) ‖ p(y)), in each of ten groups of images (Salimans et al. 2016, section 4).

    The groups are torch-fidelity's: a permutation of all `count` images, drawn from its seed 2020, cut into ten. In the
    order of a data set that is sorted by class, groups would hold few classes each. Raises `ValueError` for fewer than
    ten images.
    """

    def __init__(self, count: int, classes: int, device: torch.device | str = "cpu") -> None:
        if count < GROUPS:
            raise ValueError(f"an inception score in {GROUPS} groups needs at least {GROUPS} images; found {count}")
        self._group = np.empty(count, dtype=np.uint8)
        order = np.random.RandomState(_SEED).permutation(count)
        for group in range(GROUPS):
            self._group[order[group * count // GROUPS : (group + 1) * count // GROUPS]] = group
        self.sums = torch.zeros(GROUPS, classes + 2, dtype=torch.float64, device=device)
        """Of each group: probabilities of the classes, their negative entropy, number of images."""

    def update(self, logits: Tensor, numbers: Sequence[int]) -> None:
        """Add the logits (B, classes) of the images of these numbers, each 0 to count - 1."""
        log_p = logits.detach().to(self.sums.device).to(self.sums.dtype).log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
        groups = torch.from_numpy(self._group[list(numbers)].astype(np.int64)).to(rows.device)
        self.sums.index_add_(0, groups, rows)

    def gather(self) -> None:
        """Add up those of all processes."""
        distributed.total(self.sums)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the groups, of those that have an image; raises `ValueError` if none has."""
        sums = self.sums.cpu()
        sums = sums[sums[:, -1] > 0]
        if not len(sums):
            raise ValueError("an inception score needs images; none can be read")
        if not sums.isfinite().all():
            raise ValueError("logits are not finite: check the weights of the network")
        counts = sums[:, -1:]
        mean_p, negative_entropy = (sums[:, :-1] / counts).split([sums.shape[1] - 2, 1], dim=1)
        scores = (negative_entropy[:, 0] + torch.special.entr(mean_p).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
