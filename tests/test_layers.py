"""Single layers against the official code's numbers (`units.npz`), in float64 where it matters not to round."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity import golden
from vqhit.hit import ToRGB
from vqhit.layers import (
    MLP,
    BatchNorm,
    CrossAttention,
    Linear,
    MultiAxisAttention,
    block,
    depth_to_space,
    space_to_depth,
)
from vqhit.layers import unblock as undo_block


@pytest.fixture(scope="module")
def units():
    return {name: torch.from_numpy(array) for name, array in golden("units.npz").items()}


def load(module: nn.Module, units, case: str) -> nn.Module:
    """Fill a module with TensorFlow variables: kernels flattened to [in, out] and transposed, biases flattened."""
    leaves = {"kernel": "weight", "gamma": "weight", "moving_mean": "running_mean", "moving_variance": "running_var"}
    state = dict(module.state_dict())
    for name, value in units.items():
        if name.startswith(f"{case}/w/"):
            head, leaf = name.removeprefix(f"{case}/w/").replace("dense.", "linear.").rsplit(".", 1)
            ours = f"{head}.{'bias' if leaf == 'beta' else leaves.get(leaf, leaf)}"
            if leaf == "kernel":
                value = value.flatten(0, -2).T if head == "output" else value.flatten(1).T
            state[ours] = value.reshape(state[ours].shape)
    module.load_state_dict(state)
    return module.eval()


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found.detach().numpy(), expected.numpy(), rtol=0, atol=atol)


def test_blocking_and_its_inverse(units):
    blocked = block(units["block/in"], 4)
    assert torch.equal(blocked, units["block/out"].reshape(blocked.shape))
    assert torch.equal(undo_block(blocked, 4, 16), units["block/in"])


def test_pixel_shuffle_has_tensorflows_channel_order(units):
    assert torch.equal(depth_to_space(units["d2s/in"]), units["d2s/out"])
    assert torch.equal(depth_to_space(units["shuffle_plain/in"]), units["shuffle_plain/out"])
    assert torch.equal(space_to_depth(units["d2s/out"], 2), units["d2s/in"])
    dense = load(nn.ModuleDict({"linear": Linear(4, 8)}), units, "shuffle_dense")["linear"]
    close(dense(depth_to_space(units["shuffle_dense/in"])), units["shuffle_dense/out"])


@pytest.mark.parametrize("case", ["multiaxis_mq", "multiaxis_mq_rect"])
def test_multi_axis_attention(units, case):
    attention = load(MultiAxisAttention(width=32, heads=4), units, case)
    close(attention(units[f"{case}/q"]), units[f"{case}/out"])


def test_cross_attention_in_blocked_and_in_image_layout(units):
    attention = load(CrossAttention(width=32, heads=4, token_width=24), units, "cross_mq")
    queries, tokens = units["cross_mq/q"], units["cross_mq/v"][:, 0]
    close(attention(queries, tokens), units["cross_mq/out"])
    close(attention(queries.reshape(2, 8, 8, 32), tokens).reshape(2, 4, 16, 32), units["cross_mq/out"])


def test_rgb_head_in_eval_and_train_mode(units):
    head = load(ToRGB(16), units, "rgb")
    close(head(units["rgb/x"], units["rgb/skip"]), units["rgb/eval"])
    close(head(units["rgb/x"], None), units["rgb/eval_noskip"])
    close(head.train()(units["rgb/x"], units["rgb/skip"]), units["rgb/train"], atol=3e-6)
    close(head.norm.running_mean, units["rgb/after/norm.moving_mean"])
    close(head.norm.running_var, units["rgb/after/norm.moving_variance"])


def test_the_image_so_far_is_doubled_by_repeating_pixels(units):
    head = ToRGB(16).eval()
    nn.init.zeros_(head.linear.weight)
    assert torch.equal(head(torch.zeros(2, 8, 8, 16), units["upsample/in"]), units["upsample/out"])


def test_batch_norm_of_the_last_axis(units):
    norm = BatchNorm(6)
    close(norm.train()(units["bn/x"]), units["bn/batch_train"], atol=2e-6)
    close(norm.running_mean, units["bn/batch_mean_after"])
    close(norm.running_var, units["bn/batch_var_after"])


def test_gelu_is_the_exact_one(units):
    mlp = MLP(1).double().eval()
    mlp.norm.running_var.fill_(1 - mlp.norm.eps)  # now the norm changes nothing
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.zeros_(layer.weight)
        layer.weight.data[0, 0] = 1
    x = units["gelu/x"].double().unsqueeze(1)
    found = (mlp(x) - x).squeeze(1)
    close(found, units["gelu/out"].double(), atol=1e-6)
    assert (found - units["gelu/tanh_variant"]).abs().max() > 1e-4
