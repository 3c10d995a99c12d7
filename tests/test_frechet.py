"""Statistics of features equal numpy's, the Fréchet distance torch-fidelity's and scipy's, whatever the batches."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vqhit.frechet import FeatureStatistics, FeatureSums, frechet_distance


def features(count, dim, shift=0.0, seed=0, rank=None):
    """Of variance about 1, in as many directions as `rank` says."""
    rng, inner = np.random.default_rng(seed), rank or dim
    return torch.from_numpy(rng.normal(size=(count, inner)) @ rng.normal(size=(inner, dim)) / inner**0.5 + shift)


def statistics(vectors, batch=7):
    found = FeatureSums(vectors.shape[1])
    for part in vectors.split(batch):
        found.update(part)
    return found.statistics()


def test_mean_and_covariance_are_numpys_whatever_the_batches():
    vectors = features(50, 6, shift=3.0)
    for batch in (1, 7, 50):
        found = statistics(vectors, batch)
        np.testing.assert_allclose(found.mean, vectors.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(vectors.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


SETS = {
    "full rank": (features(600, 64), features(500, 64, shift=0.5, seed=1)),
    "singular": (features(600, 64, rank=20), features(500, 64, shift=0.5, seed=1, rank=30)),
    "fewer images than dimensions": (features(40, 64), features(30, 64, shift=0.5, seed=1)),
    "identical": (features(600, 64), features(600, 64)),
    "identical, singular": (features(30, 64), features(30, 64)),
    "one without variance": (torch.ones(5, 64, dtype=torch.float64), features(500, 64)),
}


def scipys(first, second):
    """The formula with scipy's root of C1^½ C2 C1^½, which is symmetric, so that it exists for singular ones too."""
    means, covariances = ([f(x.numpy()) for x in (first, second)] for f in (lambda x: x.mean(0), lambda x: np.cov(x.T)))
    root = scipy.linalg.sqrtm(covariances[0]).real
    middle = scipy.linalg.sqrtm(root @ covariances[1] @ root).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * middle)


@pytest.mark.parametrize("name", SETS)
def test_the_distance_is_torch_fidelitys_and_scipys(name):
    first, second = SETS[name]
    ours = frechet_distance(statistics(first), statistics(second))
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
    )
    tolerance = {"rel": 1e-6, "abs": 1e-5}
    assert ours == pytest.approx(theirs["frechet_inception_distance"], **tolerance)
    assert ours == pytest.approx(scipys(first, second), **tolerance)


def test_equal_sets_have_distance_zero_and_a_shift_its_square():
    vectors = features(4, 8)  # fewer than dimensions: the covariance is singular
    assert frechet_distance(statistics(vectors), statistics(vectors)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(statistics(vectors), statistics(vectors + 2)) == pytest.approx(8 * 4, rel=1e-9)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="features are not finite"):
        statistics(features(5, 3) * torch.tensor([1, torch.nan, 1]))
    late = features(20, 3)
    late[15] = torch.inf
    with pytest.raises(ValueError, match="features are not finite"):
        statistics(late)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images; found 1"):
        statistics(features(1, 3))


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(ValueError, match="features of 3 and of 4 numbers"):
        frechet_distance(statistics(features(5, 3)), statistics(features(5, 4)))


def test_statistics_are_saved_as_other_tools_read_them_and_read_as_they_save_them(tmp_path):
    found = statistics(features(50, 6))
    FeatureStatistics(found.mean, found.covariance, {"network": "n"}).save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as content:  # as pytorch-fid does
        np.testing.assert_array_equal(content["mu"], found.mean)
        np.testing.assert_array_equal(content["sigma"], found.covariance)
    again = FeatureStatistics.load(tmp_path / "ours.npz")
    assert torch.equal(again.mean, found.mean)
    assert torch.equal(again.covariance, found.covariance)
    assert again.origin == {"network": "n"}
    extra = np.zeros((1, 2))
    np.savez(tmp_path / "adms.npz", mu=found.mean, sigma=found.covariance, mu_s=extra, sigma_s=extra)
    assert FeatureStatistics.load(tmp_path / "adms.npz").origin is None
    assert frechet_distance(FeatureStatistics.load(tmp_path / "adms.npz"), found) == pytest.approx(0, abs=1e-9)


class Trap:
    def __reduce__(self):
        return print, ("sprung",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is \(0,\) and sigma \(0, 0\); expected"),
        ({"mu": np.zeros(3)}, "not an .npz file of statistics with mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, r"mu is \(3,\) and sigma \(3, 2\); expected \(D,\) and"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, np.nan], [0, 1]])}, "values that are not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 5], [0, 1]])}, "sigma is not symmetric"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "sigma has the eigenvalue -1"),
        ({"mu": np.array([Trap()], dtype=object), "sigma": np.eye(1)}, "not an .npz file of statistics"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [2, 1]])}, "sigma has the eigenvalue -1"),
        ({"mu": np.zeros(2) + 1j, "sigma": np.eye(2)}, "not an .npz file of statistics"),
    ],
)
def test_files_that_are_no_statistics_are_named_and_nothing_in_them_runs(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    capsys.readouterr()
    with pytest.raises(ValueError, match=message) as error:
        FeatureStatistics.load(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value)
    assert "sprung" not in capsys.readouterr().out


def test_damaged_and_missing_files_of_statistics_are_named(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"cut\.npz: not an \.npz file"):
        FeatureStatistics.load(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match=r"none\.npz: no such file"):
        FeatureStatistics.load(tmp_path / "none.npz")
