"""Networks whose features are compared: FID's Inception, and any other, whose distance is not called FID."""

from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqhit.files import KnownFile, sha256
from vqhit.images import from_uint8
from vqhit.perceptual import FeaturesConfig, feature_network, read_weights

INCEPTION = KnownFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)

_CAFFE_PIXELS: dict[str, Any] = {
    "max_value": 255.0,
    "channel_order": "bgr",
    "mean": (103.939, 116.779, 123.68),
    "std": (1.0, 1.0, 1.0),
}
_CAFFE_FILES = {"5223690a249ed65d9e0884306a5817eb21ddf51c1879d00c2efc697769d3f65e"}
"""sha256 of known files whose network expects Caffe's pixels."""
_LAST_LAYER = {"squeezenet1_1": 12, "vgg16": 30}
"""Networks of torchvision's that can be named, and the last layer of their features."""


class Extracted(NamedTuple):
    """What a network finds in images."""

    features: Tensor
    """(B, D) float32, pooled over positions."""
    logits: Tensor | None
    """(B, classes), unbiased, of a network that has classes."""


class InceptionExtractor(nn.Module):
    """FID's network, Inception-2015-12-05, as torch-fidelity runs it: (B, 3, H, W) uint8 -> features and logits.

    Its file is compared with the pinned sha256 before anything opens it, and read without executing code; the network's
    own reader, which would execute it, gets the tensors written anew. It resizes to 299 px as TensorFlow 1 did. Raises
    `ValueError` that says which file to put where, if the file cannot be had.
    """

    dim = 2048
    classes = 1008
    is_fid = True

    def __init__(self, path: Path | str | None = None, key: str = "--inception") -> None:
        super().__init__()
        weights = read_weights(INCEPTION.name, INCEPTION.read(path, key))
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        clean = BytesIO()
        torch.save(weights, clean)
        clean.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=clean
        )

    def forward(self, images: Tensor) -> Extracted:
        return Extracted(*self.network(images))

    @property
    def sha256(self) -> str:
        """Of the file of weights."""
        return INCEPTION.sha256

    @property
    def preprocessing(self) -> dict[str, Any]:
        """All beside the weights that features depend on, JSON-able."""
        return {"network": "inception-v3-compat", "layer": "2048"}

    def describe(self) -> dict[str, Any]:
        """JSON-able: the network, its file, its preprocessing."""
        return {
            "name": "Inception-2015-12-05 of torch-fidelity (inception-v3-compat)",
            "file": INCEPTION.name,
            "sha256": INCEPTION.sha256,
            "features": "2048, pooled",
            "resize": "to 299 px, bilinear of TensorFlow 1 (no half-pixel centres, no antialiasing)",
        }


class PooledExtractor(nn.Module):
    """Any network of torchvision's in FID's place: (B, 3, H, W) uint8 -> means of activations over positions.

    A distance of these features is a proxy. It is not FID and is never called so. Raises `ValueError` if images of
    `size` px do not pass through.
    """

    classes = 0
    is_fid = False

    def __init__(self, config: FeaturesConfig, weights: Path | str, size: int) -> None:
        super().__init__()
        self.config, self.network = config, feature_network(config, weights)
        self.sha256 = sha256(Path(weights).expanduser())
        self.dim = self.network.pooled_dim(size)

    def forward(self, images: Tensor) -> Extracted:
        return Extracted(self.network.pooled(from_uint8(images)), None)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """All beside the weights that features depend on, JSON-able."""
        return self.config.to_dict()

    def describe(self) -> dict[str, Any]:
        """JSON-able: the network, its file, its preprocessing."""
        return {
            "name": f"{self.config.network} of torchvision, means of activations over positions: not FID",
            "sha256": self.sha256,
            **self.preprocessing,
        }


Extractor = InceptionExtractor | PooledExtractor


def features_kind(kind: str, weights: Path | str) -> FeaturesConfig:
    """Layers and preprocessing of a network: by its name, or from a YAML file of a `FeaturesConfig`.

    A name takes the last layer of the network's features, and the pixels that torchvision's own weights expect, or
    Caffe's for a file that is known to. Raises `ValueError` for a name that is not known.
    """
    if kind.endswith((".yaml", ".yml")):
        return FeaturesConfig.from_yaml(kind)
    if kind not in _LAST_LAYER:
        raise ValueError(
            f"features kind {kind!r}: allowed: {', '.join(_LAST_LAYER)}, or a YAML file of a network and its layers"
        )
    path = Path(weights).expanduser()
    pixels = _CAFFE_PIXELS if path.is_file() and sha256(path) in _CAFFE_FILES else {}
    return FeaturesConfig(network=kind, layers=(_LAST_LAYER[kind],), **pixels)


def check_features(features: FeaturesConfig | None, weights: str | None) -> None:
    """Raise `ValueError` if there is a network without its weights, or weights without their network."""
    if (features is None) != (weights is None):
        missing = "features, a network," if features is None else "feature_weights, a file,"
        raise ValueError(f"{missing} is missing: a Fréchet distance needs both")
