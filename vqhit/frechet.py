"""The Fréchet distance between two sets of features, from float64 sums: one pass, constant memory, many processes."""

import torch
from torch import Tensor

from vqhit import distributed


class FeatureSums:
    """Count, sum and sum of outer products of feature vectors (B, D), in float64; their mean and covariance."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add feature vectors, (B, D); raises `ValueError` if one is not finite."""
        exact = features.detach().double().cpu()
        if not exact.isfinite().all():
            raise ValueError("features are not finite: check the weights of the network and its preprocessing")
        self.count += len(exact)
        self.total += exact.sum(0)
        self.outer.addmm_(exact.T, exact)

    def gather(self) -> None:
        """Add up those of all processes."""
        sums = torch.cat([torch.tensor([self.count], dtype=torch.float64), self.total, self.outer.flatten()])
        count, self.total, outer = distributed.total(sums).split([1, len(self.total), self.outer.numel()])
        self.count, self.outer = int(count), outer.view(self.outer.shape)

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased; raises `ValueError` for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; found {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: FeatureSums, second: FeatureSums) -> float:
    """‖μ1 - μ2‖² + tr(C1 + C2 - 2 (C1 C2)^½) (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the singular values of C1^½ C2^½, which exist for singular covariances too.
    Only with the features of FID's Inception network is this FID.
    """
    roots, traces = [], 0.0
    for covariance in (first.covariance, second.covariance):
        traces += float(covariance.trace())
        values, vectors = torch.linalg.eigh(covariance)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    trace_of_root = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * trace_of_root
    return float(distance.clamp(min=0))
