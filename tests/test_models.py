"""The public contract of VQHiT: shapes, ranges, errors that state the facts."""

import copy
import re

import pytest
import torch
from PIL import Image
from taming.modules.diffusionmodules import model as taming
from torch.utils.flop_counter import FlopCounterMode

from vqhit import HiTGenerator, HiTGeneratorConfig, ImageError, VQHiT, VQHiTConfig
from vqhit.config import ConfigError
from vqhit.hit import HiTConfig
from vqhit.quantizer import QuantizerConfig
from vqhit.stems import StemConfig
from vqhit.vqgan import EncoderConfig


def images(batch=3, size=16):
    torch.manual_seed(1)
    return torch.rand(batch, 3, size, size) * 2 - 1


def test_encode_decode_reconstruct(tiny_model):
    tokens = tiny_model.encode(images())
    assert (tokens.shape, tokens.dtype) == ((3, 8, 8), torch.int64)
    assert tokens.min() >= 0
    assert tokens.max() < 32
    decoded = tiny_model.decode(tokens)
    assert (decoded.shape, decoded.dtype) == ((3, 3, 16, 16), torch.float32)
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad
    assert torch.equal(decoded, tiny_model.decode(tokens.flatten(1)))
    assert torch.equal(decoded, tiny_model.reconstruct(images()))


def test_the_training_pass_is_its_parts(tiny_model):
    out = tiny_model(images())
    latents = tiny_model.encode_latents(images())
    quantized = tiny_model.quantize(latents)
    assert torch.equal(out.latents, latents)
    assert torch.equal(out.tokens, quantized.tokens)
    assert torch.equal(out.codebook_loss, quantized.loss)
    assert torch.equal(out.reconstruction, tiny_model.decode_latents(quantized.latents))
    torch.testing.assert_close(tiny_model.lookup(out.tokens), quantized.latents)
    assert torch.equal(tiny_model.encode(images()), out.tokens)


def test_every_parameter_gets_a_gradient(tiny_model):
    out = tiny_model.train()(images())
    (out.reconstruction.square().mean() + out.codebook_loss).backward()
    without = [name for name, p in tiny_model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_decoded_latents_may_leave_the_range_and_carry_gradients(tiny_model):
    latents = (100 * torch.randn(1, 8, 8, 8)).requires_grad_()
    decoded = tiny_model.decode_latents(latents)
    decoded.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_an_images_tokens_are_bit_equal_alone_and_in_any_batch(tiny_model):
    batch = images(5)
    alone = torch.cat([tiny_model.encode(image[None]) for image in batch])
    for other in (
        tiny_model.encode(batch),
        tiny_model.encode(batch, micro_batch=2),
        tiny_model.encode(batch.flip(0)).flip(0),
    ):
        assert torch.equal(alone, other)


def test_the_256_models_tokens_are_bit_equal_alone_and_in_a_batch():
    torch.manual_seed(0)
    model = VQHiT(VQHiTConfig.preset("vqhit-s-256")).eval()
    batch = images(2, 256)
    assert torch.equal(model.encode(batch), torch.cat([model.encode(image[None]) for image in batch]))
    assert (model.token_grid, model.num_tokens, model.codebook_size) == ((16, 16), 256, 1024)
    assert model.decode(model.encode(batch[:1])).shape == (1, 3, 256, 256)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.zeros(3, 16, 16),
            "images are (3, 16, 16); this model takes (B, 3, H, W), H and W multiples of 8 from 8 to 4096",
        ),
        (torch.zeros(1, 1, 16, 16), "images are (1, 1, 16, 16); this model takes (B, 3, H, W), "),
        (torch.zeros(1, 16, 16, 3), "images are (1, 16, 16, 3); this model takes (B, 3, H, W), "),
        (torch.zeros(1, 3, 20, 16), "from 8 to 4096; 16 and 24 are nearest to 20"),
        (torch.zeros(1, 3, 4, 15), "8 is nearest to 4; 8 and 16 are nearest to 15"),
        (
            torch.zeros(1, 3, 8, 4100),
            "images are (1, 3, 8, 4100); this model takes (B, 3, H, W), H and W multiples of 8",
        ),
        (torch.zeros(1, 3, 8, 4104), "4096 is nearest to 4104"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            "images are torch.uint8; this model's weights are torch.float32",
        ),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.float64),
            "images are torch.float64; this model's weights are torch.float32",
        ),
        (torch.full((1, 3, 16, 16), 255.0), "images range from 255 to 255; allowed: -1 to 1"),
        (torch.full((1, 3, 16, 16), float("nan")), "images range from nan to nan; allowed: -1 to 1"),
    ],
)
def test_encode_refuses_what_is_no_batch_of_images(tiny_model, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model.encode(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((1, 8, 8), 32), "tokens range from 32 to 32; allowed: 0 to 31"),
        (torch.full((1, 8, 8), -1), "tokens range from -1 to -1; allowed: 0 to 31"),
        (torch.zeros(1, 8, 8), "tokens are torch.float32; allowed: torch.int64"),
        (torch.zeros(1, 8, 8, dtype=torch.int32), "tokens are torch.int32; allowed: torch.int64"),
        (
            torch.zeros(64, dtype=torch.int64),
            "tokens are (64,); this model takes (B, 64), or (B, H, W), ",
        ),
        (torch.zeros(1, 4, 15, dtype=torch.int64), "from 4 to 2048; 12 and 16 are nearest to 15"),
        (
            torch.zeros(1, 65, dtype=torch.int64),
            "tokens are (1, 65); this model takes (B, 64), or (B, H, W), ",
        ),
        (
            torch.zeros(1, 1, 8, 8, dtype=torch.int64),
            "tokens are (1, 1, 8, 8); this model takes (B, 64), or (B, H, W), ",
        ),
    ],
)
def test_decode_refuses_what_are_no_tokens(tiny_model, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model.decode(given)


def test_latents_of_another_shape_are_refused(tiny_model):
    for method in (tiny_model.quantize, tiny_model.decode_latents):
        with pytest.raises(ValueError, match=re.escape("latents are (1, 4, 8, 8); this model takes (B, 8, H, W), ")):
            method(torch.zeros(1, 4, 8, 8))


def test_latents_of_another_dtype_are_refused(tiny_model):
    for method in (tiny_model.quantize, tiny_model.decode_latents):
        with pytest.raises(ValueError, match=r"latents are torch\.int64; this model's weights are torch\.float32"):
            method(torch.zeros(1, 8, 8, 8, dtype=torch.int64))


def test_autocast_may_mix_dtypes(tiny_model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tiny_model(images())
    assert out.reconstruction.shape == (3, 3, 16, 16)


def test_preprocess_and_postprocess_refuse_other_things(tiny_model):
    with pytest.raises(ValueError, match="found a int; a photograph is a PIL image or a path"):
        tiny_model.preprocess([3])
    with pytest.raises(ValueError, match=re.escape("images are (3, 16, 16); allowed: (B, 3, H, W)")):
        tiny_model.postprocess(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"images are torch\.uint8; allowed: floating point"):
        tiny_model.postprocess(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_attention_resolutions_must_be_those_of_the_encoders_maps():
    config = VQHiTConfig.preset("vqhit-s-256")
    with pytest.raises(ConfigError, match=r"encoder\.attention_resolutions: found \[15\]; the maps are 256, 128"):
        VQHiTConfig(**{**dict(config), "encoder": EncoderConfig(attention_resolutions=(15,))})


def test_a_convolutional_decoder_takes_the_place_of_hits(conv_config, tmp_path):
    torch.manual_seed(0)
    model = VQHiT(conv_config).eval()
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder",
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded = VQHiT.from_pretrained(tmp_path)
    assert loaded.config == conv_config
    assert torch.equal(loaded.reconstruct(images()), model.reconstruct(images()))
    model(images()).reconstruction.square().sum().backward()
    assert all(parameter.grad is not None for part in model.decoder_parts for parameter in part.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": StemConfig()}, "stem: a decoder of kind conv has none; leave it out"),
        (
            {"decoder": {"kind": "conv", "resolution": 16, "attention_resolutions": []}},
            "decoder.channel_multipliers enlarge 16 times; the encoder reduces 2 times",
        ),
        ({"decoder": {"kind": "conv", "resolution": 8192}}, "resolution 8192; allowed: up to 4096"),
        (
            {"encoder": EncoderConfig(channel_multipliers=(1, 1, 1, 1, 1), attention_resolutions=())},
            "16 px into a 1x1 token grid; at least 2x2",
        ),
        ({"decoder": {"kind": "cnov"}}, "decoder.kind: found 'cnov'; allowed: hit, conv"),
        ({"decoder": {"kind": "conv", "resolution": 24}}, "resolution 24: not a multiple of 16, its upsampling"),
        (
            {"decoder": {"kind": "conv", "attention_resolutions": [15]}},
            r"decoder.attention_resolutions: found \[15\]; the maps are 256, 128",
        ),
        ({"decoder": {"kind": "conv", "width": 64}}, "decoder.width: unknown key; allowed: channels"),
        ({"decoder": 5}, "decoder: found 5; expected a mapping, of kind hit, conv"),
        ({"decoder": {1: 2}}, "decoder: found {1: 2}; expected a mapping, of kind hit, conv"),
        ({"decoder": None}, "decoder: found None; expected a mapping, of kind hit, conv"),
    ],
)
def test_convolutional_decoders_that_do_not_fit_are_named(conv_config, change, message):
    with pytest.raises(ConfigError, match=message):
        VQHiTConfig(**{**dict(conv_config), **change})


def test_the_stem_starts_near_unit_variance():
    torch.manual_seed(0)
    model = VQHiT(VQHiTConfig.preset("vqhit-s-256"))
    feature_map, _, _ = model.stem(0.2 * torch.randn(8, 256, 16, 16))
    assert feature_map.std().item() == pytest.approx(1, rel=0.05)
    assert model.stem.token_projection.weight.std().item() == pytest.approx(5 / 4096**0.5, rel=0.05)


def test_micro_batch_must_be_positive(tiny_model):
    with pytest.raises(ValueError, match="micro_batch is 0; allowed: a whole number, 1 or more"):
        tiny_model.encode(images(), micro_batch=0)


def test_an_empty_batch_gives_empty_results(tiny_model):
    tokens = tiny_model.encode(torch.zeros(0, 3, 16, 16))
    assert tokens.shape == (0, 8, 8)


def test_preprocess_takes_paths_and_pictures_and_postprocess_gives_them_back(tiny_model, picture, tmp_path):
    picture(40, 30).save(tmp_path / "a.png")
    single = tiny_model.preprocess(tmp_path / "a.png")
    several = tiny_model.preprocess([str(tmp_path / "a.png"), picture(40, 30), picture(20, 90).convert("L")])
    assert single.shape == (1, 3, 16, 16)
    assert several.shape == (3, 3, 16, 16)
    assert torch.equal(several[0], several[1])
    back = tiny_model.postprocess(several)
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in back)
    assert torch.equal(tiny_model.preprocess(back[0])[0], several[0])
    with pytest.raises(ValueError, match="no photographs given"):
        tiny_model.preprocess([])
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        tiny_model.preprocess(tmp_path / "absent.png")


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_presets_are_vqgans_encoder_and_a_hit(size):
    config = VQHiTConfig.preset(f"vqhit-{size}-256")
    assert config.decoder == HiTConfig.preset(f"hit-{size}-256")
    assert config.encoder == EncoderConfig(
        channels=128, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=2, attention_resolutions=(16,), z_channels=256
    )
    assert config.quantizer == QuantizerConfig(codebook_size=1024, dim=256, commitment=0.25)
    assert config.stem == StemConfig(latent_grid=4, skip=True)
    assert (config.image_size, config.token_grid) == (256, (16, 16))


def test_unknown_presets_are_named_with_the_known_ones():
    for cls, known in ((VQHiTConfig, "vqhit-s-256"), (HiTGeneratorConfig, "hit-b-1024"), (HiTConfig, "hit-l-128")):
        with pytest.raises(ValueError, match=f"no preset 'hit-x'; there are: .*{known}"):
            cls.preset("hit-x")


@pytest.mark.parametrize(("latent_grid", "skip"), [(4, True), (8, False), (16, False), (2, False)])
def test_stem_options_change_the_inputs_and_not_the_rest(latent_grid, skip):
    base = VQHiTConfig.preset("vqhit-s-256")
    with torch.device("meta"):
        model = VQHiT(VQHiTConfig(**{**dict(base), "stem": StemConfig(latent_grid=latent_grid, skip=skip)}))
        codes = torch.empty(2, 256, 16, 16)
        feature_map, tokens, skipped = model.stem(codes)
        assert feature_map.shape == (2, 8, 8, 512)
        assert tokens.shape == (2, latent_grid**2, 512)
        assert (None if skipped is None else skipped.shape) == ((2, 16, 16, 256) if skip else None)
        assert model.decode_latents(codes).shape == (2, 3, 256, 256)
        plain = VQHiT(base)
    assert {k: v.shape for k, v in model.backbone.state_dict().items()} == {
        k: v.shape for k, v in plain.backbone.state_dict().items()
    }


def test_the_stem_skip_reaches_the_image():
    torch.manual_seed(0)
    config = VQHiTConfig(
        encoder=EncoderConfig(
            channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), z_channels=8
        ),
        quantizer=QuantizerConfig(codebook_size=32, dim=8),
        stem=StemConfig(skip=True),
        decoder=HiTConfig(widths=(32, 16), depths=(1, 1), heads=(4, 2), block_sizes=(4,)),
    )
    model = VQHiT(config).eval()
    codes = torch.randn(1, 8, 16, 16)
    before = model.decode_latents(codes)
    torch.nn.init.zeros_(model.stem.skip.weight)
    assert not torch.allclose(before, model.decode_latents(codes))


def test_a_grid_smaller_than_hits_first_map_is_refused():
    config = VQHiTConfig.preset("vqhit-s-256")
    encoder = EncoderConfig(channel_multipliers=(1, 1, 2, 2, 4, 4, 4))
    with pytest.raises(ConfigError, match="256 px into a 4x4 token grid; HiT needs at least 8x8"):
        VQHiTConfig(**{**dict(config), "encoder": encoder})


def test_a_generator_makes_images_from_noise():
    with torch.device("meta"):
        model = HiTGenerator(HiTGeneratorConfig.preset("hit-b-1024"))
        assert model(torch.empty(1, 512)).shape == (1, 3, 1024, 1024)


def test_the_stem_skip_needs_the_second_stages_grid(tiny_config):
    with pytest.raises(
        ConfigError, match=r"stem\.skip needs a token grid of 16x16, the second stage's map; this one is 8x8"
    ):
        VQHiTConfig(**{**dict(tiny_config), "stem": StemConfig(skip=True)})


def test_decoding_takes_about_a_tenth_of_vqgans_arithmetic():
    """GFLOPs of one image of 256 px, two per multiply-add; the README quotes them."""
    with torch.device("meta"), torch.no_grad():
        model = VQHiT(VQHiTConfig.preset("vqhit-b-256")).eval()
        theirs = taming.Decoder(
            ch=128,
            out_ch=3,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(16,),
            in_channels=3,
            resolution=256,
            z_channels=256,
        ).eval()
        gflops = []
        optimized = copy.deepcopy(model).optimize_for_inference()
        for decode in (model.decode_latents, optimized.decode_latents, theirs):
            with FlopCounterMode(display=False) as counter:
                decode(torch.empty(1, 256, 16, 16))
            gflops.append(counter.get_total_flops() / 1e9)
    assert gflops == pytest.approx([26.0, 23.9, 252.7], abs=0.05)
