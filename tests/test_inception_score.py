"""The inception score equals torch-fidelity's, whatever the batches and their order."""

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from vqhit.inception_score import InceptionScore


def logits(count, classes=30, scale=3.0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(count)) * scale


def score(values, batch, order=None):
    found = InceptionScore(len(values), values.shape[1])
    for numbers in (order if order is not None else torch.arange(len(values))).split(batch):
        found.update(values[numbers], numbers.tolist())
    return found.result()


@pytest.mark.parametrize("count", [10, 57, 503])
def test_it_is_torch_fidelitys(count):
    expected = isc_features_to_metric(logits(count))
    mean, std = score(logits(count), batch=16)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_batches_and_their_order_do_not_matter():
    values = logits(101)
    shuffled = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    assert score(values, 7) == pytest.approx(score(values, 101, shuffled), rel=1e-13)


def test_probabilities_that_vanish_count_as_nothing():
    certain = torch.full((20, 5), -1e4).index_fill_(1, torch.tensor([2]), 1e4)  # all of one class, the others never
    assert score(certain, 20) == pytest.approx((1, 0))
    each = torch.full((2000, 4), -1e4).scatter_(1, torch.arange(2000)[:, None] % 4, 1e4)
    assert score(each, 100)[0] == pytest.approx(4, rel=0.02)  # four classes, each certain, almost evenly in each group


def test_too_few_images_are_an_error():
    with pytest.raises(ValueError, match="needs at least 10 images; found 9"):
        InceptionScore(9, 5)
    found = InceptionScore(20, 5)
    found.update(logits(3, 5)[:1], [7])
    assert found.result()[0] == pytest.approx(1)  # one image has one class, and groups without images do not count
    found.update(torch.full((1, 5), torch.nan), [3])
    with pytest.raises(ValueError, match="logits are not finite"):
        found.result()
    with pytest.raises(ValueError, match="needs images; none can be read"):
        InceptionScore(20, 5).result()
