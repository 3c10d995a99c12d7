"""Statistics of features equal numpy's, and the Fréchet distance its formula, whatever the batches."""

import numpy as np
import pytest
import scipy.linalg
import torch

from vqhit.frechet import FeatureSums, frechet_distance


def features(count, dim, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + shift)


def sums(vectors, batch=7):
    found = FeatureSums(vectors.shape[1])
    for part in vectors.split(batch):
        found.update(part)
    return found


def test_mean_and_covariance_are_numpys_whatever_the_batches():
    vectors = features(50, 6, shift=3.0)
    for batch in (1, 7, 50):
        found = sums(vectors, batch)
        np.testing.assert_allclose(found.mean, vectors.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(vectors.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_the_distance_is_its_formula():
    first, second = features(60, 5), features(40, 5, shift=0.5, seed=1)
    means, covariances = (
        [statistic(each.numpy()) for each in (first, second)]
        for statistic in (lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False))
    )
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(sums(first), sums(second)) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_have_distance_zero_and_a_shift_its_square():
    vectors = features(4, 8)  # fewer than dimensions: the covariance is singular
    assert frechet_distance(sums(vectors), sums(vectors)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(sums(vectors), sums(vectors + 2)) == pytest.approx(8 * 4, rel=1e-9)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="features are not finite"):
        sums(features(5, 3) * torch.tensor([1, torch.nan, 1]))


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images; found 1"):
        frechet_distance(sums(features(1, 3)), sums(features(5, 3)))
