"""PSNR and SSIM equal scikit-image's on real photographs; an evaluation names its protocol."""

import json
import math

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision import models

from vqhit.evaluate import evaluate_tokenizer
from vqhit.files import sha256
from vqhit.folder import list_images
from vqhit.images import center_crop, from_uint8, load_image, pil_to_uint8, to_uint8
from vqhit.metrics import psnr, ssim
from vqhit.perceptual import FeaturesConfig


@pytest.fixture(scope="module")
def photographs():
    """Two photographs at 96 px, and the same after a coarse JPEG compression."""
    originals, degraded = [], []
    for array in (skimage.data.astronaut(), skimage.data.chelsea()):
        small = center_crop(Image.fromarray(array), 96)
        originals.append(pil_to_uint8(small))
        degraded.append(pil_to_uint8(small.resize((24, 24)).resize((96, 96))))
    return torch.stack(originals), torch.stack(degraded)


def test_psnr_is_scikit_images(photographs):
    expected = [
        peak_signal_noise_ratio(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy(), data_range=255)
        for a, b in zip(*photographs, strict=True)
    ]
    np.testing.assert_allclose(psnr(*photographs), expected, rtol=1e-12)


def test_ssim_is_scikit_images_with_a_gaussian_window(photographs):
    expected = [
        structural_similarity(
            a.permute(1, 2, 0).numpy() / 255,
            b.permute(1, 2, 0).numpy() / 255,
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(*photographs, strict=True)
    ]
    np.testing.assert_allclose(ssim(*photographs), expected, rtol=1e-9)


def test_equal_images_reach_the_ceiling(photographs):
    originals, _ = photographs
    assert psnr(originals, originals).tolist() == [100.0, 100.0]
    assert ssim(originals, originals).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_refuses_images_smaller_than_its_window():
    small = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="SSIM needs at least 11x11"):
        ssim(small, small)


def test_evaluation_is_the_mean_over_images_and_names_its_protocol(tiny_model, photo_folder):
    results = evaluate_tokenizer(tiny_model, photo_folder, batch_size=4)
    paths = [photo_folder / name for name in list_images(photo_folder)]
    crops = torch.stack([pil_to_uint8(center_crop(load_image(path), 16)) for path in paths])
    floats = tiny_model.preprocess(paths)
    tokens = tiny_model.encode(floats)
    reconstructions = torch.stack([pil_to_uint8(image) for image in tiny_model.postprocess(tiny_model.decode(tokens))])
    assert results["images"] == 6
    assert results["psnr"] == pytest.approx(psnr(crops, reconstructions).mean().item(), rel=1e-9)
    assert results["ssim"] == pytest.approx(ssim(crops, reconstructions).mean().item(), rel=1e-9)
    assert results["codes_used"] == len(tokens.unique())
    shares = torch.bincount(tokens.flatten()).double() / tokens.numel()
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p > 0)
    assert results["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert results["protocol"]["crop"].startswith("ADM center crop")
    json.dumps(results, allow_nan=False)


def test_results_do_not_depend_on_batch_size_or_workers(tiny_model, photo_folder):
    keys = ("psnr", "ssim", "codes_used", "codebook_perplexity")
    one = evaluate_tokenizer(tiny_model, photo_folder, batch_size=1)
    other = evaluate_tokenizer(tiny_model, photo_folder, batch_size=5, workers=2)
    assert [one[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-6)


def test_limit_takes_images_spread_over_the_folder(tiny_model, photo_folder):
    assert evaluate_tokenizer(tiny_model, photo_folder, limit=2)["images"] == 2
    paths = [photo_folder / name for name in list_images(photo_folder)]
    first_and_fourth = tiny_model.preprocess([paths[0], paths[3]])
    expected = psnr(to_uint8(first_and_fourth), to_uint8(tiny_model.reconstruct(first_and_fourth))).mean().item()
    assert evaluate_tokenizer(tiny_model, photo_folder, limit=2)["psnr"] == pytest.approx(expected, rel=1e-6)
    assert evaluate_tokenizer(tiny_model, photo_folder, limit=100)["images"] == 6


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A file of SqueezeNet features, generated, and the configuration of two of its layers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), path)
    return FeaturesConfig(network="squeezenet1_1", layers=(1, 4)), path


def test_the_frechet_distance_is_that_of_pooled_features(tiny_model, photo_folder, squeezenet):
    features, weights = squeezenet
    results = evaluate_tokenizer(tiny_model, photo_folder, batch_size=4, features=features, feature_weights=weights)
    images = tiny_model.preprocess([photo_folder / name for name in list_images(photo_folder)])
    network = models.squeezenet1_1(weights=None).features[:5].eval()
    network.load_state_dict({k.removeprefix("features."): v for k, v in load_file(weights).items()}, strict=False)
    vectors = []
    for pictures in (images, from_uint8(to_uint8(tiny_model.reconstruct(images)))):
        standardised = ((pictures + 1) / 2 - torch.tensor(features.mean).view(-1, 1, 1)) / torch.tensor(
            features.std
        ).view(-1, 1, 1)
        with torch.no_grad():
            early = network[:2](standardised)
            vectors.append(torch.cat([early.mean((2, 3)), network[2:](early).mean((2, 3))], dim=1).double())
    covariances = [vector.T.cov() for vector in vectors]
    # The root's trace in another way: a product of two positive semidefinite matrices has no negative eigenvalues.
    roots = np.linalg.eigvals((covariances[0] @ covariances[1]).numpy()).real.clip(0) ** 0.5
    expected = (vectors[0].mean(0) - vectors[1].mean(0)).square().sum() + (covariances[0] + covariances[1]).trace()
    assert results["frechet_distance"] == pytest.approx(float(expected) - 2 * roots.sum(), rel=1e-4)
    described = results["protocol"]["frechet_distance"]
    assert (described["network"], described["layers"]) == ("squeezenet1_1", [1, 4])
    assert described["weights_sha256"] == sha256(weights)
    assert "not FID" in described["features"]


@pytest.mark.parametrize("missing", ["features", "feature_weights"])
def test_a_frechet_distance_needs_a_network_and_its_weights(tiny_model, photo_folder, squeezenet, missing):
    given = {"features": squeezenet[0], "feature_weights": squeezenet[1], missing: None}
    expected = {"features": "a network and its layers", "feature_weights": "a file of weights"}[missing]
    with pytest.raises(ValueError, match=f"the Fréchet distance needs {expected} .{missing}. too"):
        evaluate_tokenizer(tiny_model, photo_folder, **given)


def test_networks_that_images_do_not_pass_through_or_that_cannot_be_pooled_are_named(
    tiny_model, photo_folder, squeezenet, tmp_path
):
    features = squeezenet[0].model_copy(update={"layers": (12,)})
    message = "features of squeezenet1_1: images of 16 px do not pass through"
    with pytest.raises(ValueError, match=message):
        evaluate_tokenizer(tiny_model, photo_folder, features=features, feature_weights=squeezenet[1])
    save_file(models.swin_t(weights=None).features.state_dict(prefix="features."), tmp_path / "swin.safetensors")
    with pytest.raises(ValueError, match="a Fréchet distance needs at least 2 images; found 1"):
        evaluate_tokenizer(tiny_model, photo_folder, limit=1, features=squeezenet[0], feature_weights=squeezenet[1])
    swin = FeaturesConfig(network="swin_t", layers=(1,))
    with pytest.raises(ValueError, match=r"features of swin_t: not .B, C, h, w., so that they cannot be pooled"):
        evaluate_tokenizer(tiny_model, photo_folder, features=swin, feature_weights=tmp_path / "swin.safetensors")
