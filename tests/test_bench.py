"""The instruments that compare speeds; no time is asserted."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vqhit.bench import (
    Allocated,
    allocated,
    check_counts,
    count_gflops,
    images_per_s,
    peak_mib,
    ratio_of_speeds,
    time_in_turns,
)
from vqhit.layers import MLP

CPU = torch.device("cpu")


def test_parts_run_in_turns_and_once_before_they_are_timed(monkeypatch):
    clock, calls, done = [0.0], [], []

    def part(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds if calls[-2:] == [name] * 2 else 100

        return run

    def on_done():
        done.append(calls[-1])
        clock[0] += 50  # is not the part's

    monkeypatch.setattr("vqhit.bench.time.perf_counter", lambda: clock[0])
    parts = {"a": part("a", 1.0), "b": part("b", 2.0)}
    assert time_in_turns(parts, 3, CPU, on_done) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert calls == ["a", "a", "b", "b"] * 3
    assert done == ["a", "b"] * 3


def test_rates_are_images_by_seconds():
    assert images_per_s([1.0, 4.0, 2.0], 8) == {
        "images_per_s": 4.0,
        "images_per_s_lowest": 2.0,
        "images_per_s_highest": 8.0,
    }


def test_ratios_are_of_each_round():
    """A machine that is slower in one round is so for both: the ratio of medians would be 1."""
    found = ratio_of_speeds("relative", seconds=[1.0, 2.0, 8.0], base=[2.0, 8.0, 2.0])
    assert found == {"relative": 2.0, "relative_lowest": 0.25, "relative_highest": 4.0}


MIB = 2**18  # numbers of float32


def chain():
    """Of 4, 8 and 2 MiB; at most two are there at once."""
    first = torch.empty(4 * MIB)
    second = torch.empty(8 * MIB)
    del first
    third = torch.empty(2 * MIB)
    del second
    return third


def test_peak_memory_of_a_known_chain():
    held = torch.empty(16 * MIB)  # before the call: not its own
    assert peak_mib(chain, CPU) == peak_mib(chain, CPU) == 12
    assert peak_mib(lambda: (torch.neg(chain()), held), CPU) == 12
    assert peak_mib(lambda: torch.neg(torch.neg(torch.neg(held))), CPU) == 32
    assert peak_mib(lambda: [torch.empty(MIB) for _ in range(3)], CPU) == 3


def test_peak_memory_in_place_is_that_of_one_tensor():
    held = torch.ones(MIB)
    assert peak_mib(lambda: torch.neg(held).neg_().neg_(), CPU) == 1


def test_all_that_is_allocated_counts_once_freed_too():
    assert allocated(chain) == Allocated(peak=12 * 2**20, total=14 * 2**20)


def test_arithmetic_is_counted_by_hand():
    layer, x = nn.Conv2d(3, 5, kernel_size=3, padding=1), torch.zeros(2, 3, 8, 8)
    assert count_gflops(lambda: layer(x)) == 2 * (2 * 8 * 8) * 5 * (3 * 3 * 3) / 1e9


def test_arithmetic_is_counted_forward_and_backward():
    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    assert count_gflops(lambda: (x @ weight.T).sum().backward()) == 3 * 2 * 5 * 4 * 3 / 1e9


def test_arithmetic_is_counted_where_a_leafs_gradient_is_asked_for():
    """FlopCounterMode fails there."""
    layer, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    assert count_gflops(lambda: torch.autograd.grad(layer(x).sum(), x)) == 2 * 2 * 5 * 4 * 3 / 1e9


def test_arithmetic_is_that_of_torchs_counter(tiny_model):
    images = torch.rand(1, 3, 16, 16)
    runs = (lambda: tiny_model.encode(images), lambda: tiny_model(images).reconstruction.sum().backward())
    for run in runs:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert count_gflops(run) == counter.get_total_flops() / 1e9


def test_counts_are_one_or_more():
    check_counts(rounds=1)
    with pytest.raises(ValueError, match="rounds is 0; allowed: 1 or more"):
        check_counts(batch_size=1, rounds=0)


def test_products_that_add_to_their_result_are_counted():
    mlp, x = MLP(8).eval(), torch.zeros(5, 8)
    assert count_gflops(lambda: mlp(x)) == 2 * 5 * (8 * 32 + 32 * 8) / 1e9
