"""Perceptual losses: distances between the activations of a network trained on ImageNet.

Three kinds. `vgg16` is the paper's F (appendix A.5): conv4_3 with the Caffe weights, on pixels from 0 to 255. `lpips`
is Zhang et al. 2018, on the VGG16 trunk. `features` is any network of torchvision's with its preprocessing. Weights
come from torchvision's cache or download, or from a file; nothing is unpickled beyond tensors.
"""

import pickle
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from safetensors.torch import load, load_file
from torch import Tensor, nn

from vqhit.config import Config, Finite, NonNegativeInt, Positive, Text
from vqhit.files import KnownFile, check_hash

PerceptualKind = Literal["vgg16", "lpips", "features"]

# The weights of the two VGG16 differ: Caffe's want pixels from 0 to 255, torchvision's own want them standardised.
_DOWNLOADS = "https://download.pytorch.org/models/"
VGG16_CAFFE = KnownFile(
    "vgg16_features-amdegroot-88682ab5.pth", f"{_DOWNLOADS}vgg16_features-amdegroot-88682ab5.pth", "88682ab5"
)
VGG16_TORCHVISION = KnownFile(
    "vgg16-397923af.pth",
    f"{_DOWNLOADS}vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)


class FeaturesConfig(Config):
    """A network of torchvision's with a `features` part, the layers to compare, and the pixels that it expects.

    Pixels run from 0 to `max_value` in `channel_order`; `mean` is subtracted, then they are divided by `std`, both in
    that order and range. The defaults are those of torchvision's own weights; Caffe's are max_value 255, bgr,
    mean [103.939, 116.779, 123.68], std [1, 1, 1].
    """

    network: Text
    layers: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Indices into `features`, as torchvision numbers them."""
    max_value: Positive = 1.0
    channel_order: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError(f"found {list(layers)}; each layer once")
        return layers


# torchvision's VGG16_Weights.IMAGENET1K_FEATURES and its transform (std 1/255): conv4_3 after ReLU.
_VGG16_CONV4_3 = FeaturesConfig(
    network="vgg16", layers=(22,), mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255)
)


def perceptual_network(
    kind: PerceptualKind,
    weights: Path | str | None = None,
    features: FeaturesConfig | None = None,
    key: str = "loss.perceptual_weights",
) -> "FeatureDistance | LPIPS":
    """Build a perceptual loss with its weights: a frozen module in eval mode, two (B, 3, H, W) in [-1, 1] -> scalar.

    `weights` names the file; without it the published one is taken from torchvision's cache or downloaded (`features`
    always needs a file); `key` is what an error calls it. Raises `ValueError` that says which file to put where.
    """
    if kind == "features":
        if features is None or weights is None:
            raise ValueError(
                "perceptual kind 'features' needs a network (perceptual_features) and a file of its weights"
            )
        return feature_network(features, weights)
    path = (VGG16_CAFFE if kind == "vgg16" else VGG16_TORCHVISION).find(weights, key)
    if kind == "vgg16":
        return FeatureDistance(_VGG16_CONV4_3, read_weights(path), str(path))
    return LPIPS(read_weights(path), str(path))


def feature_network(config: FeaturesConfig, weights: Path | str) -> "FeatureDistance":
    """Build any network of torchvision's with the weights in a file, frozen."""
    path = Path(weights).expanduser()
    check_hash(path)
    return FeatureDistance(config, read_weights(path), str(path))


def check_image_size(perceptual: nn.Module, size: int, key: str = "loss.perceptual_network") -> None:
    """Raise `ValueError` if images of `size` px are too small for a perceptual network, which is called `key`."""
    black = torch.full((1, 3, size, size), -1.0, device=next(perceptual.parameters()).device)
    try:
        perceptual(black, black)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}: images of {size} px do not pass through it ({reason})") from None


class FeatureDistance(nn.Module):
    """‖F(x) - F(x̂)‖² of eq. 5, the mean over elements, summed over layers: two (B, 3, H, W) in [-1, 1] -> scalar.

    Gradients flow to the first argument only. `weights` holds `features.*`, as torchvision names them; other keys are
    ignored. The squares are taken in float32 or more, also under autocast.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FeaturesConfig, weights: dict[str, Tensor], source: str) -> None:
        super().__init__()
        self.config = config
        features = _torchvision_features(config.network)
        if (last := max(config.layers)) >= len(features):
            raise ValueError(f"layer {last}: the features of {config.network} are layers 0 to {len(features) - 1}")
        self.features = features[: last + 1]
        for module in self.features.modules():
            if getattr(module, "inplace", False):  # it would overwrite the activations of the layer before it
                setattr(module, "inplace", False)  # noqa: B010  (typed as a submodule)
        _load(self.features, weights, source)
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def activations(self, images: Tensor) -> list[Tensor]:
        """Activations of the configured layers for images (B, 3, H, W) in [-1, 1]."""
        x = (images + 1) * (self.config.max_value / 2)
        x = ((x.flip(1) if self.config.channel_order == "bgr" else x) - self.mean) / self.std
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.config.layers:
                found.append(x.to(torch.promote_types(x.dtype, torch.float32)))
        return found

    def pooled_dim(self, size: int) -> int:
        """Length D of what `pooled` gives for images of `size` px; raises `ValueError` if they do not pass through."""
        device, dims = self.mean.device, []
        for side in (size, 2 * size):
            try:
                dims.append(self.pooled(torch.full((1, 3, side, side), -1.0, device=device)).shape[1])
            except (RuntimeError, IndexError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"features of {self.config.network}: images of {side} px do not pass through ({reason})"
                ) from None
        if dims[0] != dims[1] or dims[0] == 1:
            raise ValueError(f"features of {self.config.network}: not (B, C, h, w), so that they cannot be pooled")
        return dims[0]

    def pooled(self, images: Tensor) -> Tensor:
        """Means of the activations over positions, all layers in a row: (B, 3, H, W) in [-1, 1] -> (B, D)."""
        return torch.cat([found.mean((2, 3)) for found in self.activations(images)], dim=1)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.activations(images)
        pairs = zip(self.activations(reconstruction), targets, strict=True)
        return torch.stack([F.mse_loss(ours, target) for ours, target in pairs]).sum()


class LPIPS(nn.Module):
    """LPIPS (VGG16 trunk, version 0.1), the mean over images: two (B, 3, H, W) in [-1, 1] -> scalar.

    The networks are the `lpips` package's. Its own forward pass has no gradient (NaN) at pixels where all activations
    of a layer are zero; this one does. Gradients flow to the first argument only.
    """

    def __init__(self, weights: dict[str, Tensor], source: str) -> None:
        super().__init__()
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision by arguments that torchvision has since renamed
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        layers = [layer for part in self.lpips.net.children() for layer in part]  # slices of torchvision's features
        _load(nn.Sequential(*layers), weights, source)
        self.eval().requires_grad_(False)

    def activations(self, images: Tensor) -> list[Tensor]:
        """Activations of the five layers, normalised to unit length per pixel, in float32 or more."""
        found = []
        for x in self.lpips.net(self.lpips.scaling_layer(images)):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            norm = exact.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt()
            found.append(exact / (norm + 1e-10))
        return found

    def per_image(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Distance of each pair, (B,)."""
        with torch.no_grad():
            targets = self.activations(images)
        distances = [
            ((ours - target).square() * head.model[-1].weight).sum(1).mean((1, 2))  # a 1x1 convolution
            for ours, target, head in zip(self.activations(reconstruction), targets, self.lpips.lins, strict=True)
        ]
        return torch.stack(distances).sum(0)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return self.per_image(reconstruction, images).mean()


def _torchvision_features(network: str) -> nn.Sequential:
    from torchvision import models

    if network not in (known := models.list_models(module=models)):
        raise ValueError(f"network {network!r}: torchvision has none of this name; it has {', '.join(known)}")
    features = None
    # On meta there are no weights yet, and none of the classifier's ever. Networks that cannot be built there, RegNets,
    # read their weights while they are made; they have no `features` either.
    with torch.device("meta"), suppress(NotImplementedError):
        features = getattr(models.get_model(network, weights=None), "features", None)
    if not isinstance(features, nn.Sequential):
        raise ValueError(f"network {network!r} has no `features`; vgg16, squeezenet1_1 or efficientnet_b0 have")
    return features


def _load(layers: nn.Sequential, weights: dict[str, Tensor], source: str) -> None:
    """Put the tensors `features.<index>.*` into layers; raises `ValueError` naming one that is missing or misshapen."""
    state = {}
    for name, tensor in layers.state_dict().items():
        found = weights.get(f"features.{name}")
        if found is None and name.endswith("num_batches_tracked"):  # a counter that nothing reads here
            found = torch.zeros_like(tensor, device="cpu")
        if found is None:
            some = ", ".join(list(weights)[:3]) or "none"
            raise ValueError(f"{source}: no tensor features.{name}; it has {len(weights)} tensors: {some} ...")
        if found.shape != tensor.shape:
            raise ValueError(f"{source}: features.{name} is {tuple(found.shape)}; expected {tuple(tensor.shape)}")
        if found.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{source}: features.{name} is {found.dtype}; expected {tensor.dtype}")
        state[name] = found
    layers.load_state_dict(state, assign=True)


def read_weights(path: Path | str, data: bytes | None = None) -> dict[str, Tensor]:
    """Tensors by name from a .pth or .safetensors file, or from its content if that was read already.

    Nothing in it is executed. Raises `ValueError` for a file that is damaged or holds more than tensors.
    """
    try:
        if Path(path).suffix == ".safetensors":
            weights = load_file(path) if data is None else load(data)
        else:
            weights = torch.load(path if data is None else BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text advises to switch the protection off
        raise ValueError(
            f"{path}: no readable file of weights (it holds more than tensors, or is damaged; a state_dict is needed)"
        ) from None
    except Exception as error:  # a damaged file can raise anything: KeyError, struct.error, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no readable file of weights ({reason})") from None
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: holds a {type(weights).__name__}; expected tensors by name")
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
