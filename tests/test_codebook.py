"""What keeps a learned codebook alive: usage counts, running means, restarts."""

import math

import pytest
import torch

from vqhit.codebook import CodebookAverage, CodebookTraining, CodebookUsage, DeadCodes
from vqhit.quantizer import Quantizer, QuantizerConfig


def test_usage_and_perplexity_are_counted_over_all_updates():
    usage = CodebookUsage(8)
    assert (usage.codes_used, usage.usage) == (0, 0.0)
    usage.update(torch.tensor([[0, 0], [1, 1]]))
    usage.update(torch.tensor([[[2, 3]]]))
    usage.update(torch.tensor([2, 3]))
    assert (usage.codes_used, usage.usage) == (4, 0.5)
    assert usage.perplexity == pytest.approx(4.0)
    usage.update(torch.zeros(8, dtype=torch.int64))
    probabilities = [10 / 16, 2 / 16, 2 / 16, 2 / 16]
    assert usage.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in probabilities)))


def test_dead_codes_move_onto_latents_of_the_batch():
    codebook = torch.full((4, 2), 100.0)
    vectors = torch.arange(8.0).view(4, 2)
    dead_codes = DeadCodes(4, after=2)
    tokens = torch.zeros(1, 2, 2, dtype=torch.int64)

    moved = dead_codes.restart(codebook, vectors, tokens, torch.Generator().manual_seed(0))
    assert moved.tolist() == [1, 2, 3]  # at first every code that is not chosen counts as dead
    assert codebook[0].tolist() == [100, 100]
    for row in codebook[1:]:
        assert (vectors == row).all(1).any()
    assert len({tuple(row) for row in codebook.tolist()}) == 4  # on different latents

    still = codebook.clone()
    for _ in range(2):
        assert dead_codes.restart(codebook, vectors, tokens, torch.Generator()).tolist() == []
    assert torch.equal(codebook, still)
    assert dead_codes.restart(codebook, vectors, tokens, torch.Generator()).tolist() == [1, 2, 3]


def test_no_more_codes_move_than_there_are_latents():
    codebook = torch.zeros(10, 2)
    dead_codes = DeadCodes(10, after=1)
    vectors, tokens = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
    assert dead_codes.restart(codebook, vectors, tokens, torch.Generator()).tolist() == [1, 2, 3]
    assert dead_codes.restart(codebook, vectors, tokens, torch.Generator()).tolist() == [4, 5, 6]


def test_running_means_follow_the_formula():
    torch.manual_seed(0)
    codebook = torch.randn(5, 2, dtype=torch.float64)
    average = CodebookAverage(codebook, decay=0.9)
    counts, sums = [1.0] * 5, codebook.tolist()
    for step in range(3):
        vectors = torch.randn(7, 2, dtype=torch.float64)
        tokens = torch.randint(0, 4, (7,), generator=torch.Generator().manual_seed(step))  # nobody chooses code 4
        average.update(codebook, vectors, tokens)
        for code in range(5):
            mine = [vector.tolist() for vector, token in zip(vectors, tokens, strict=True) if token == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
            sums[code] = [0.9 * sums[code][axis] + 0.1 * sum(v[axis] for v in mine) for axis in range(2)]
    total = sum(counts)
    for code in range(5):
        smoothed = (counts[code] + 1e-5) / (total + 5e-5) * total
        assert codebook[code].tolist() == pytest.approx([value / smoothed for value in sums[code]])


def test_running_means_reach_the_means_of_the_latents():
    torch.manual_seed(0)
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0]])
    codebook = torch.tensor([[1.0, 0.1], [-1.0, 0.1]])
    average = CodebookAverage(codebook, decay=0.5)
    for _ in range(30):
        vectors = centres.repeat(8, 1)
        average.update(codebook, vectors, torch.cdist(vectors, codebook).argmin(1))
    torch.testing.assert_close(codebook, centres, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_training_state_continues_exactly(update):
    def start():
        torch.manual_seed(0)
        quantizer = Quantizer(QuantizerConfig(codebook_size=16, dim=3, update=update))
        return quantizer, CodebookTraining(quantizer, restart_after=2, seed=7)

    def train(quantizer, training, steps):
        for step in range(*steps):
            latents = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(step))
            training.update(latents, quantizer(latents).tokens, step)

    whole, first, second = start(), start(), start()
    train(*whole, (0, 8))
    train(*first, (0, 4))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict({name: tensor.clone() for name, tensor in first[1].state_dict().items()})
    train(*second, (4, 8))
    assert torch.equal(second[0].codebook, whole[0].codebook)
    assert not torch.equal(first[0].codebook, whole[0].codebook)


def test_a_moved_code_starts_its_mean_anew():
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(codebook_size=6, dim=3, update="ema"))
    training = CodebookTraining(quantizer, restart_after=1, seed=0)
    latents = torch.randn(1, 3, 2, 2)
    moved = training.update(latents, quantizer(latents).tokens, 0)
    assert len(moved) > 0
    torch.testing.assert_close(training.average.sums[moved], quantizer.codebook[moved])
    assert training.average.counts[moved].unique().tolist() == [1]


def test_normalised_codes_move_onto_normalised_latents():
    quantizer = Quantizer(QuantizerConfig(codebook_size=2, dim=3, normalize=True))
    latents = 9 * torch.randn(1, 3, 2, 2)
    moved = CodebookTraining(quantizer, restart_after=1, seed=0).update(latents, torch.zeros(1, 2, 2).long(), 0)
    torch.testing.assert_close(quantizer.codebook[moved].norm(dim=1), torch.ones(1))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_code_that_nobody_chooses_stays_where_it_was(normalize):
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(codebook_size=4, dim=3, update="ema", ema_decay=0.9, normalize=normalize))
    training = CodebookTraining(quantizer, restart_after=0, seed=0)
    start = quantizer.lookup(torch.arange(4).view(1, 1, 4))
    latents, tokens = torch.randn(1, 3, 1, 5), torch.zeros(1, 1, 5, dtype=torch.int64)
    for step in range(2000):
        training.update(latents, tokens, step)
    torch.testing.assert_close(
        quantizer.lookup(torch.arange(4).view(1, 1, 4))[..., 1:], start[..., 1:], rtol=0.02, atol=1e-3
    )
    if not normalize:
        torch.testing.assert_close(quantizer.codebook[0], latents.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
