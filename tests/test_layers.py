"""Single layers against the official code's numbers (`units.npz`), in float64 where it matters not to round."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity import golden
from vqhit.hit import ToRGB
from vqhit.layers import MLP, CrossAttention, Linear, SelfAttention, block, depth_to_space, space_to_depth
from vqhit.layers import unblock as undo_block
from vqhit.norms import BatchNorm, build_norm


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


@pytest.mark.parametrize("case", ["multiaxis_mq", "multiaxis_mq_rect", "multiaxis_mh"])
def test_multi_axis_attention(units, case):
    attention = load(SelfAttention(width=32, heads=4, multi_query="mq" in case), units, case)
    close(attention(units[f"{case}/q"]), units[f"{case}/out"])


@pytest.mark.parametrize("case", ["cross_mq", "cross_mh"])
def test_cross_attention_in_blocked_and_in_image_layout(units, case):
    attention = load(CrossAttention(width=32, heads=4, token_width=24, multi_query=case == "cross_mq"), units, case)
    queries, memory = units[f"{case}/q"], attention.memory(units[f"{case}/v"][:, 0])
    close(attention(queries, memory), units[f"{case}/out"])
    close(attention(queries.reshape(2, 8, 8, 32), memory).reshape(2, 4, 16, 32), units[f"{case}/out"])


def attention_by_hand(attention, x, axes):
    """Algorithm 2 written out for multi-query attention: (B, G, P, C), one loop a head."""
    heads = attention.query.out_features // attention.head_width
    queries = attention.query(x).unflatten(-1, (heads, attention.head_width))
    keys, values = attention.key(x), attention.value(x)
    found = []
    for head in range(heads):
        equation = {
            "regional": ("bgpd,bgsd->bgps", "bgps,bgsd->bgpd"),
            "dilated": ("bgpd,bspd->bgps", "bgps,bspd->bgpd"),
        }
        to_logits, to_values = equation[axes[head * len(axes) // heads]]
        logits = torch.einsum(to_logits, queries[..., head, :], keys) / attention.head_width**0.5
        found.append(torch.einsum(to_values, logits.softmax(-1), values))
    return attention.output(torch.cat(found, -1))


@pytest.mark.parametrize("axes", [("regional",), ("dilated",), ("regional", "dilated"), ("dilated", "regional")])
def test_self_attention_along_every_choice_of_axes(axes):
    torch.manual_seed(0)
    attention = SelfAttention(width=16, heads=4, axes=axes).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(x), attention_by_hand(attention, x, axes), rtol=1e-12, atol=1e-12)


def test_rgb_head_in_eval_and_train_mode(units):
    head = load(ToRGB(16, "batch"), units, "rgb")
    image = units["rgb/skip"].movedim(-1, 1)
    close(head(units["rgb/x"], image).movedim(1, -1), units["rgb/eval"])
    close(head(units["rgb/x"], None).movedim(1, -1), units["rgb/eval_noskip"])
    close(head.train()(units["rgb/x"], image).movedim(1, -1), units["rgb/train"], atol=3e-6)
    close(head.norm.running_mean, units["rgb/after/norm.moving_mean"])
    close(head.norm.running_var, units["rgb/after/norm.moving_variance"])


def test_the_image_so_far_is_doubled_by_repeating_pixels(units):
    head = ToRGB(16, "batch").eval()
    nn.init.zeros_(head.linear.weight)
    image, doubled = (units[f"upsample/{name}"].movedim(-1, 1) for name in ("in", "out"))
    assert torch.equal(head(torch.zeros(2, 8, 8, 16), image), doubled)


def test_batch_norm_of_the_last_axis(units):
    norm = BatchNorm(6)
    close(norm.train()(units["bn/x"]), units["bn/batch_train"], atol=2e-6)
    close(norm.running_mean, units["bn/batch_mean_after"])
    close(norm.running_var, units["bn/batch_var_after"])


def test_layer_norm_has_the_official_epsilon(units):
    close(build_norm("layer", 6)(units["ln/x"]), units["ln/out"], atol=2e-6)


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
