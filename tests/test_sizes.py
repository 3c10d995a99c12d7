"""Images of other sizes than a model's own, and decoding a few at a time."""

import re
from pathlib import Path

import pytest
import skimage
import torch
from torch import nn

from vqhit import VQHiT, VQHiTConfig
from vqhit.hit import HiTConfig
from vqhit.images import to_uint8
from vqhit.metrics import psnr
from vqhit.quantizer import QuantizerConfig
from vqhit.sizes import Sizes
from vqhit.stems import StemConfig
from vqhit.vqgan import ConvDecoderConfig, EncoderConfig

PHOTOS = [
    Path(skimage.__file__).parent / "data" / name for name in ("chelsea.png", "coffee.png", "motorcycle_left.png")
]


def config(**decoder):
    """The shape of vqhit-b-256, slim: f16, six stages, blocks of 4 4 8 8, the skip."""
    hit = HiTConfig.preset("hit-b-256")
    sizes = {"widths": (64, 32, 16, 16, 8, 8), "depths": (2, 2, 1, 1, 1, 1), "heads": (4, 4, 4, 4, 2, 2), **decoder}
    return VQHiTConfig(
        encoder=EncoderConfig(channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=32),
        quantizer=QuantizerConfig(codebook_size=64, dim=8),
        stem=StemConfig(skip=True),
        decoder=HiTConfig(**{**hit.to_dict(), **sizes}),
    )


def lively(config):
    torch.manual_seed(0)
    model = VQHiT(config)
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(parameter)
    return model.eval()


def images(*size, batch=1):
    torch.manual_seed(1)
    return torch.rand(batch, 3, *size) * 2 - 1


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (384, 384), (512, 512), (128, 384)], ids=str)
def test_a_256_model_takes_multiples_of_128(size):
    model = lively(config())
    tokens = model.encode(images(*size))
    assert tokens.shape == (1, size[0] // 16, size[1] // 16)
    decoded = model.decode(tokens)
    assert decoded.shape == (1, 3, *size)
    assert torch.equal(decoded, model.reconstruct(images(*size)))
    assert decoded.std() > 0.01
    other = tokens.clone()
    other[0, -1, -1] = (other[0, -1, -1] + 1) % 64
    assert not torch.equal(model.decode(other)[..., -16:, -16:], decoded[..., -16:, -16:])
    assert model.quantize(model.encode_latents(images(*size))).latents.shape == (1, 8, *tokens.shape[1:])


def test_the_256_presets_take_multiples_of_128():
    for name in ("vqhit-s-256", "vqhit-b-256", "vqhit-l-256"):
        assert VQHiTConfig.preset(name).sizes == Sizes(128, 128, 4096)


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (32, 32), (8, 24)], ids=str)
def test_positions_are_interpolated_and_latent_tokens_averaged_or_repeated(grid):
    """Against the parts, each given what it needs by hand."""
    model = lively(config())
    codes = model.lookup(torch.randint(64, (2, *grid), generator=torch.Generator().manual_seed(2)))
    feature_map, tokens, skip = model.stem(codes)
    patches = codes.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3)  # of 4x4 codes each
    rows = {8: [[0], [0], [1], [1]], 24: [[0, 1], [1, 2], [3, 4], [4, 5]], 32: [[0, 1], [2, 3], [4, 5], [6, 7]]}
    pooled = torch.stack(
        [patches[:, up][:, :, left].mean((1, 2)) for up in rows[grid[0]] for left in rows[grid[1]]], dim=1
    )
    expected = model.stem.tokens(model.stem.token_projection(pooled))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    assert feature_map.shape == (2, grid[0] // 2, grid[1] // 2, 64)
    found = model.backbone(feature_map, tokens, skip)
    for stage in model.backbone.stages:
        height, width = (size * stage.position_embedding.shape[0] // 16 for size in grid)
        channels_first = stage.position_embedding.data.permute(2, 0, 1)[None]
        resized = nn.Upsample((height, width), mode="bicubic")(channels_first)[0]
        stage.position_embedding = nn.Parameter(resized.permute(1, 2, 0).contiguous())
    torch.testing.assert_close(model.backbone(feature_map, tokens, skip), found)


@pytest.mark.parametrize("changes", [{"attention": "axial"}, {"attention": "full"}, {"attention": "interleaved"}, {}])
def test_every_kind_of_attention_takes_other_sizes(changes):
    depths = (2, 2, 2, 2, 1, 1)
    if changes.get("attention") in ("axial", "full"):
        changes = {**changes, "block_sizes": (None,) * 4}
    model = lively(config(depths=depths, multi_query=False, norm="layer", **changes))
    unit = model.config.sizes.unit
    assert unit == (64 if "block_sizes" in changes else 128)
    assert model.decode(model.encode(images(2 * unit, unit))).shape == (1, 3, 2 * unit, unit)


@pytest.mark.parametrize(
    ("changes", "grid", "unit"),
    [
        ({}, 4, 128),
        ({"block_sizes": (8, 4, 8, 8)}, 4, 256),
        ({"block_sizes": (4, 4, 8, 32)}, 4, 128),
        ({"block_sizes": (2, 4, 8, 16)}, 4, 64),
        ({"block_sizes": ()}, 16, 32),
        ({"block_sizes": ()}, 1, 256),
        ({"block_sizes": (), "cross_attention": False}, 1, 32),
    ],
)
def test_sizes_are_those_whose_maps_divide_into_blocks_and_latent_tokens(changes, grid, unit):
    base = config(**changes)
    model = lively(base.model_copy(update={"stem": StemConfig(latent_grid=grid)}))
    assert model.config.sizes == Sizes(unit, unit, 4096)
    assert model.decode(model.encode(images(unit, unit))).shape == (1, 3, unit, unit)


def test_a_convolutional_decoder_takes_multiples_of_its_factor(tiny_config):
    encoder = EncoderConfig(channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(8,))
    decoder = ConvDecoderConfig(**{**encoder.to_dict(), "resolution": 32})
    model = VQHiT(VQHiTConfig(encoder=encoder, quantizer=tiny_config.quantizer, decoder=decoder)).eval()
    assert model.config.sizes == Sizes(4, 8, 4096)
    assert model.decode(model.encode(images(8, 52))).shape == (1, 3, 8, 52)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (200, "H and W multiples of 128 from 128 to 4096; 128 and 256 are nearest to 200"),
        (16, "128 is nearest to 16"),
        (0, "128 is nearest to 0"),
        (5000, "4096 is nearest to 5000"),
    ],
)
def test_other_sizes_are_refused_naming_the_nearest(side, message):
    model = VQHiT(config()).eval()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.encode(torch.zeros(1, 3, side, 256))
    with pytest.raises(ValueError, match=f"size is {side}; this model takes H and W multiples of 128 "):
        model.preprocess(PHOTOS, side)
    with pytest.raises(ValueError, match=r"size is '64'; this model takes H and W multiples of 128 from 128 to 4096$"):
        model.preprocess(PHOTOS, "64")
    with pytest.raises(ValueError, match=re.escape("H and W multiples of 8 from 8 to 256; 8 and 16 are nearest to 12")):
        model.decode(torch.zeros(1, 16, 12, dtype=torch.int64))


def test_a_skip_of_three_codes_sees_those_around_and_none_further():
    model = VQHiT(config().model_copy(update={"stem": StemConfig(skip=True, skip_kernel=3)}))
    codes = torch.randn(1, 8, 16, 16)
    (gradient,) = torch.autograd.grad(model.stem(codes.requires_grad_())[2][0, 5, 9].sum(), codes)
    assert (gradient[0] != 0).any(0).nonzero().tolist() == [[y, x] for y in (4, 5, 6) for x in (8, 9, 10)]
    assert 0.5 < model.stem(0.2 * codes)[2].std() < 2
    with pytest.raises(ValueError, match="skip_kernel 3: there is no skip; set skip too"):
        StemConfig(skip_kernel=3)


@pytest.mark.parametrize("size", [32, 96, 128])
def test_a_trained_model_reconstructs_other_sizes_about_as_well_as_its_own(size):
    """Smaller images of the same photographs have finer detail: 2 dB less at half the size, more at larger ones."""
    model = VQHiT.from_pretrained("vqhit-tiny-64")
    found = {}
    for side in (64, size):
        photos = model.preprocess(PHOTOS, side)
        assert photos.shape == (3, 3, side, side)
        reconstructions = model.reconstruct(photos, micro_batch=1)
        found[side] = float(psnr(to_uint8(photos), to_uint8(reconstructions)).mean())
    print(found)
    assert found[size] > found[64] + (-3 if size < 64 else 0)


def test_micro_batches_bound_what_is_decoded_at_a_time(tiny_model):
    tokens = torch.randint(32, (7, 8, 8))
    together, sizes = tiny_model.decode(tokens), []
    hook = tiny_model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for count, expected in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7]), (None, [7])):
        sizes.clear()
        found = tiny_model.decode(tokens.flatten(1), micro_batch=count)
        assert sizes == expected
        torch.testing.assert_close(found, together, atol=1e-5, rtol=0)
    sizes.clear()
    tiny_model.reconstruct(images(16, 16, batch=5), micro_batch=2)
    assert sizes == [2, 2, 1]
    hook.remove()
    assert tiny_model.decode(tokens[:0]).shape == (0, 3, 16, 16)
    for method in (tiny_model.decode, tiny_model.reconstruct, tiny_model.encode):
        for wrong in (0, -1, 1.5, True, "2"):
            with pytest.raises(ValueError, match=f"micro_batch is {wrong!r}; allowed: a whole number, 1 or more"):
                method(tokens if method == tiny_model.decode else images(16, 16), micro_batch=wrong)
