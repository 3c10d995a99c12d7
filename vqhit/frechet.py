"""The Fréchet distance between two sets of features, from float64 sums: one pass, constant memory, many processes."""

import json
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqhit import distributed
from vqhit.files import write_atomic


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and unbiased covariance (D, D) of feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    origin: dict[str, Any] | None = None
    """How they were made, if that is known."""

    @property
    def dim(self) -> int:
        """Length D of the vectors."""
        return len(self.mean)

    def save(self, path: Path | str) -> None:
        """Write an .npz file of `mu` and `sigma`, as other FID tools read and write it, and of `origin` as JSON."""
        content = BytesIO()
        origin = json.dumps(self.origin or {})
        np.savez(content, mu=self.mean.numpy(), sigma=self.covariance.numpy(), vqhit=np.array(origin))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), content.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> "FeatureStatistics":
        """Read an .npz file that holds `mu` (D,) and `sigma` (D, D), of whatever tool; nothing in it is executed.

        `origin` is that of a file which `save` wrote. Raises `ValueError` for anything else.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no zip archive")
            with np.load(path, allow_pickle=False) as content:
                mu, sigma = (content[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
                origin = json.loads(str(content["vqhit"])) if "vqhit" in content else None
        except Exception as error:  # of zip, of numpy, of JSON: a damaged file raises almost any type
            raise ValueError(
                f"{path}: not an .npz file of statistics with mu and sigma ({' '.join(str(error).split())})"
            ) from None
        if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{path}: mu is {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D)")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{path}: mu or sigma holds values that are not finite")
        if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-4 * np.abs(sigma).max(initial=0)):
            raise ValueError(f"{path}: sigma is not symmetric, so that it is no covariance")
        if (spectrum := np.linalg.eigvalsh(sigma))[0] < -1e-3 * abs(spectrum[-1]):
            raise ValueError(f"{path}: sigma has the eigenvalue {spectrum[0]:g}, so that it is no covariance")
        return cls(torch.from_numpy(mu), torch.from_numpy(sigma), origin if isinstance(origin, dict) else None)


class FeatureSums:
    """Count, sum and sum of outer products of feature vectors (B, D), in float64; their mean and covariance."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add feature vectors, (B, D); raises `ValueError` if one of the first is not finite."""
        exact = features.detach().to(self.total.device).to(self.total.dtype)  # some devices have no float64
        if not self.count:
            _check_finite(exact)
        self.count += len(exact)
        self.total += exact.sum(0)
        self.outer.addmm_(exact.T, exact)

    def gather(self) -> None:
        """Add up those of all processes."""
        count = torch.tensor([self.count], dtype=torch.float64, device=self.total.device)
        sums = distributed.total(torch.cat([count, self.total, self.outer.flatten()]))
        total_count, self.total, outer = sums.split([1, len(self.total), self.outer.numel()])
        self.count, self.outer = int(total_count), outer.view(self.outer.shape)

    def statistics(self, origin: dict[str, Any] | None = None) -> FeatureStatistics:
        """Mean and covariance, on the CPU; raises `ValueError` for fewer than two vectors, or if one is not finite."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; found {self.count}")
        _check_finite(self.total)
        mean, outer = (self.total / self.count).cpu(), self.outer.cpu()
        covariance = (outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return FeatureStatistics(mean, covariance, origin)


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError("features are not finite: check the weights of the network and its preprocessing")


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """‖μ1 - μ2‖² + tr(C1 + C2 - 2 (C1 C2)^½) (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the singular values of C1^½ C2^½, which exist for singular covariances too.
    Only with the features of FID's Inception network is this FID. Raises `ValueError` for vectors of
    unlike lengths.
    """
    if first.dim != second.dim:
        raise ValueError(f"features of {first.dim} and of {second.dim} numbers: they are of two different networks")
    roots = [_root(covariance) for covariance in (first.covariance, second.covariance)]
    trace_of_root = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * trace_of_root
    if not distance.isfinite():
        raise ValueError("the distance is not finite: the statistics hold numbers that are too large")
    return float(distance.clamp(min=0))


def _root(covariance: Tensor) -> Tensor:
    """(D, D) -> (D, rank): a matrix R with R Rᵀ = C, its columns orthogonal. Rounding's eigenvalues are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
