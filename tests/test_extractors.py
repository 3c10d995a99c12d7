"""FID's network is torch-fidelity's to the bit, its file checked before it is opened; other networks are not FID."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import get_featuresdict_from_dataset
from torchvision import models

from tests.inception import known_as_published
from vqhit import extractors
from vqhit.extractors import INCEPTION, InceptionExtractor, PooledExtractor, features_kind
from vqhit.perceptual import FeaturesConfig


@pytest.mark.parametrize("size", [32, 64, 299])
def test_features_and_logits_are_torch_fidelitys_to_the_bit(inception, size):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return images[index]

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception)
    )
    theirs = get_featuresdict_from_dataset(
        Images(), network, batch_size=3, cuda=False, save_cpu_ram=True, verbose=False
    )
    ours = InceptionExtractor(inception)(images)
    assert torch.equal(ours.features, theirs["2048"])
    assert torch.equal(ours.logits, theirs["logits_unbiased"])
    assert ours.features.shape == (3, InceptionExtractor.dim)
    assert ours.logits.shape == (3, InceptionExtractor.classes)
    assert ours.features.std(0).max() > 1e-3  # of a network that tells images apart


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_a_file_with_another_hash_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("crafted.pth").write_bytes(pickle.dumps(Trap()))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=r"crafted\.pth: another file, or damaged: .* expected 6726825d0af5"):
        InceptionExtractor("crafted.pth")
    assert not Path("sprung").exists()


def test_a_file_is_not_executed_even_if_its_hash_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Trap()}, "crafted.pth")
    monkeypatch.setattr(extractors, "INCEPTION", known_as_published(Path("crafted.pth")))
    with pytest.raises(ValueError, match="it holds more than tensors"):
        InceptionExtractor("crafted.pth")
    assert not Path("sprung").exists()


def test_the_cache_is_used_and_where_nothing_can_be_had_the_file_is_named(inception, no_downloads):
    with pytest.raises(ValueError, match="cannot download") as error:
        InceptionExtractor()
    for part in (INCEPTION.name, INCEPTION.url, str(no_downloads), extractors.INCEPTION.sha256, "--inception"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    no_downloads.mkdir(parents=True, exist_ok=True)
    (no_downloads / INCEPTION.name).symlink_to(inception)
    InceptionExtractor()


def test_the_pinned_file_is_torch_fidelitys():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert INCEPTION.url == URL_INCEPTION_V3
    assert INCEPTION.name == URL_INCEPTION_V3.rpartition("/")[2]
    assert INCEPTION.name.endswith(f"-{INCEPTION.sha256[:8]}.pth")


@pytest.fixture
def squeezenet(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "squeezenet.safetensors"
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), path)
    return path


def test_a_named_network_has_its_last_layer_and_the_pixels_of_its_file(squeezenet, monkeypatch, tmp_path):
    config = features_kind("squeezenet1_1", squeezenet)
    assert config == FeaturesConfig(network="squeezenet1_1", layers=(12,))  # torchvision's pixels
    monkeypatch.setattr(extractors, "_CAFFE_FILES", {extractors.sha256(squeezenet)})
    caffe = Path(__file__).parent.parent / "configs" / "features" / "squeezenet1_1_caffe.yaml"
    assert features_kind("squeezenet1_1", squeezenet) == features_kind(str(caffe), squeezenet)
    with pytest.raises(ValueError, match="features kind 'resnet': allowed: squeezenet1_1, vgg16, or a YAML file"):
        features_kind("resnet", squeezenet)
    for network, last in extractors._LAST_LAYER.items():
        assert len(models.get_model(network, weights=None).features) == last + 1


def test_another_network_says_that_it_is_not_fid(squeezenet):
    extractor = PooledExtractor(features_kind("squeezenet1_1", squeezenet), squeezenet, 64)
    found = extractor(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert found.features.shape == (2, extractor.dim) == (2, 512)
    assert found.logits is None
    assert not extractor.is_fid
    assert "not FID" in extractor.describe()["name"]
    assert extractor.describe()["sha256"] == extractors.sha256(squeezenet)
