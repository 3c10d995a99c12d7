"""Perceptual losses: their scale, their weights, what they refuse."""

import functools
import http.server
import io
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision import models
from torchvision.models import VGG16_Weights

from vqhit import perceptual
from vqhit.config import ConfigError
from vqhit.files import KnownFile, sha256
from vqhit.perceptual import FeatureDistance, FeaturesConfig, perceptual_network

CONV_WIDTHS = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512]
CAFFE_MEAN = [123, 117, 104]  # RGB, the mean of the training images rounded, as these weights were trained
SQUEEZENET = {
    "network": "squeezenet1_1",
    "layers": [1, 4],
    "max_value": 255,
    "channel_order": "bgr",
    "mean": [103.939, 116.779, 123.68],
    "std": [1, 1, 1],
}


def vgg16_weights():
    """He-initialised VGG16 features with small biases, by torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    weights, channels, index = {}, 3, 0
    for width in CONV_WIDTHS:
        if width == "pool":
            index += 1
            continue
        std = (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * std
        weights[f"features.{index}.bias"] = 0.01 * torch.randn(width, generator=generator)
        channels, index = width, index + 2
    return weights


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    """A generated file of VGG16 weights, with a classifier that nobody reads, as the published ones have."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({**vgg16_weights(), "classifier.0.weight": torch.full((2, 2), float("nan"))}, path)
    return path


@pytest.fixture
def published(vgg16_file, monkeypatch):
    """The generated file stands in for both published ones."""
    for name in ("VGG16_CAFFE", "VGG16_TORCHVISION"):
        monkeypatch.setattr(perceptual, name, KnownFile(f"{name}.pth", "http://127.0.0.1:9/x", sha256(vgg16_file)))
    return vgg16_file


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, size=32, mode="bilinear")
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(-1, 1), images


def conv4_3(x, weights):
    """VGG16 up to conv4_3 and its ReLU, from the weights alone."""
    index, convolutions = 0, 0
    for width in CONV_WIDTHS:
        if width == "pool":
            x, index = F.max_pool2d(x, 2), index + 1
            continue
        x = F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1).relu()
        convolutions, index = convolutions + 1, index + 2
        if convolutions == 10:
            return x
    raise AssertionError


def test_vgg16_is_conv4_3_on_caffes_scale(published, pair):
    reconstruction, images = pair
    weights = vgg16_weights()

    def caffe(x):
        return conv4_3((x + 1) / 2 * 255 - torch.tensor(CAFFE_MEAN).view(-1, 1, 1), weights)

    def standardised(x):
        mean, std = (torch.tensor(t).view(-1, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return conv4_3(((x + 1) / 2 - mean) / std, weights)

    found = perceptual_network("vgg16", published)(reconstruction, images)
    expected = (caffe(reconstruction) - caffe(images)).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # torchvision: five digits
    ratio = expected / (standardised(reconstruction) - standardised(images)).square().mean()
    print(f"Caffe scale over standardised pixels: {ratio:.0f}")
    assert ratio > 1000


def test_lpips_is_the_lpips_packages(published, pair):
    import lpips

    reconstruction, images = pair
    ours = perceptual_network("lpips", published)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    names = [
        f"slice{number}.{name}"
        for number in range(1, 6)
        for name, _ in getattr(theirs.net, f"slice{number}").named_parameters()
    ]
    weights = vgg16_weights()
    theirs.net.load_state_dict({name: weights[f"features.{name.split('.', 1)[1]}"] for name in names})
    with torch.no_grad():
        torch.testing.assert_close(ours.per_image(reconstruction, images), theirs(reconstruction, images).flatten())
        torch.testing.assert_close(ours(reconstruction, images), theirs(reconstruction, images).mean())


def test_lpips_has_a_gradient_where_all_activations_are_zero(published, pair):
    loss = perceptual_network("lpips", published)
    with torch.no_grad():
        loss.lpips.net.slice1[0].bias.fill_(-100.0)  # nothing passes the first ReLU
    reconstruction = pair[0].clone().requires_grad_()
    loss(reconstruction, pair[1]).backward()
    assert torch.isfinite(reconstruction.grad).all()


@pytest.mark.parametrize("kind", ["vgg16", "lpips"])
def test_gradients_reach_the_reconstruction_only(published, pair, kind):
    loss = perceptual_network(kind, published)
    reconstruction, images = (tensor.clone().requires_grad_() for tensor in pair)
    loss(reconstruction, images).backward()
    assert reconstruction.grad.any()
    assert images.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_equal_images_have_no_distance(published, pair):
    for kind in ("vgg16", "lpips"):
        assert perceptual_network(kind, published)(pair[1], pair[1]).item() == 0


@pytest.mark.parametrize("kind", ["vgg16", "lpips"])
def test_under_autocast_the_squares_are_float32(published, pair, kind):
    loss = perceptual_network(kind, published)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*pair)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(*pair).item(), rel=0.1)


@pytest.fixture
def squeezenet(tmp_path):
    torch.manual_seed(0)
    network = models.squeezenet1_1(weights=None)
    path = tmp_path / "squeezenet.safetensors"
    save_file(network.features.state_dict(prefix="features."), path)
    return network.features.eval(), path


def test_features_of_any_network_with_its_preprocessing(squeezenet, pair):
    network, path = squeezenet
    found = perceptual_network("features", path, FeaturesConfig(**SQUEEZENET))(*pair)
    expected = 0
    for last in SQUEEZENET["layers"]:
        ours, theirs = (
            network[: last + 1](((x + 1) / 2 * 255).flip(1) - torch.tensor(SQUEEZENET["mean"]).view(-1, 1, 1))
            for x in pair
        )
        expected = expected + (ours - theirs).square().mean()
    torch.testing.assert_close(found, expected)


def test_a_layer_is_not_overwritten_by_the_next(squeezenet, pair):
    loss = perceptual_network("features", squeezenet[1], FeaturesConfig(**{**SQUEEZENET, "layers": [0, 1]}))
    convolution, relu = loss.activations(pair[0])
    assert convolution.min() < 0
    torch.testing.assert_close(convolution.relu(), relu)


def test_weights_in_half_precision_are_read(squeezenet, pair, tmp_path):
    half = {f"features.{name}": tensor.half() for name, tensor in squeezenet[0].state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    found = perceptual_network("features", tmp_path / "half.safetensors", FeaturesConfig(**SQUEEZENET))(*pair)
    expected = perceptual_network("features", squeezenet[1], FeaturesConfig(**SQUEEZENET))(*pair)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_the_published_files_and_the_preprocessing_are_torchvisions():
    caffe, own = VGG16_Weights.IMAGENET1K_FEATURES, VGG16_Weights.IMAGENET1K_V1
    for known, weights in ((perceptual.VGG16_CAFFE, caffe), (perceptual.VGG16_TORCHVISION, own)):
        assert known.url == weights.url
        assert known.name == Path(weights.url).name
        assert known.sha256.startswith(Path(weights.url).stem.rsplit("-", 1)[1])
    transform, ours = caffe.transforms(), perceptual._VGG16_CONV4_3
    assert (list(ours.mean), list(ours.std)) == (list(transform.mean), list(transform.std))
    assert (ours.channel_order, ours.max_value) == ("rgb", 1)


@pytest.mark.parametrize("kind", ["vgg16", "lpips"])
def test_weights_are_downloaded_into_the_cache_and_used_from_there(vgg16_file, kind, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=vgg16_file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{vgg16_file.name}"
        for name in ("VGG16_CAFFE", "VGG16_TORCHVISION"):
            monkeypatch.setattr(perceptual, name, KnownFile(f"{name}.pth", url, sha256(vgg16_file)))
        first = perceptual_network(kind)(*pair)
        server.shutdown()
    torch.testing.assert_close(perceptual_network(kind)(*pair), first)  # offline now
    assert len(list((tmp_path / "hub" / "checkpoints").iterdir())) == 1


def test_the_wrong_file_is_refused(published, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"other\.pth: another file, or damaged: its sha256 is"):
        perceptual_network("vgg16", other)


def test_missing_and_misshapen_tensors_are_named(tmp_path, squeezenet):
    weights = {f"features.{name}": tensor for name, tensor in squeezenet[0].state_dict().items()}
    config = FeaturesConfig(**SQUEEZENET)
    with pytest.raises(ValueError, match=r"mine: no tensor features\.0\.weight; it has 1 tensors: 0\.weight \.\.\."):
        FeatureDistance(config, {"0.weight": torch.zeros(1)}, "mine")
    with pytest.raises(ValueError, match=r"mine: features\.0\.bias is torch\.int64; expected torch\.float32"):
        FeatureDistance(config, {**weights, "features.0.bias": torch.zeros(64, dtype=torch.int64)}, "mine")
    with pytest.raises(ValueError, match=r"mine: no tensor features\.0\.bias"):
        FeatureDistance(config, {**weights, "features.0.bias": None}, "mine")
    with pytest.raises(ValueError, match=r"mine: features\.0\.bias is \(3,\); expected \(64,\)"):
        FeatureDistance(config, {**weights, "features.0.bias": torch.zeros(3)}, "mine")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_counters_of_batch_norm_may_be_missing():
    network = models.mobilenet_v2(weights=None).features[:2]
    weights = {f"features.{name}": tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    config = FeaturesConfig(network="mobilenet_v2", layers=[1])
    assert FeatureDistance(config, weights, "mine")(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)) == 0


@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"hello", b"version https://git-lfs.github.com/spec/v1", "code"]
)
def test_a_file_that_is_no_weights_is_named_and_nothing_in_it_runs(tmp_path, capsys, content):
    path = tmp_path / "bad.pth"
    if content == "code":
        buffer = io.BytesIO()
        torch.save({"features.0.weight": Evil()}, buffer)
        content = buffer.getvalue()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pth: no readable file of weights") as error:
        perceptual_network("features", path, FeaturesConfig(**SQUEEZENET))
    assert "weights_only" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "squeezenet9"}, "network 'squeezenet9': torchvision has none of this name; it has alexnet"),
        ({"network": "resnet18"}, "network 'resnet18' has no `features`"),
        ({"network": "regnet_x_400mf"}, "network 'regnet_x_400mf' has no `features`"),
        ({"layers": [40]}, "layer 40: the features of squeezenet1_1 are layers 0 to 12"),
    ],
)
def test_an_impossible_network_is_named(squeezenet, changes, message):
    with pytest.raises(ValueError, match=message):
        perceptual_network("features", squeezenet[1], FeaturesConfig(**{**SQUEEZENET, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers"),
        ({"layers": [1, 1]}, r"layers: found \[1, 1\]; each layer once"),
        ({"mean": [float("nan"), 0, 0]}, "mean.0: found nan"),
        ({"std": [1, 0, 1]}, "std.1: found 0"),
    ],
)
def test_impossible_options_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        FeaturesConfig(**{**SQUEEZENET, **changes})
