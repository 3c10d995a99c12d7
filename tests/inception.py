"""A randomly initialised Inception in a file of its own, in the place of the published one."""

import dataclasses
from io import BytesIO

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vqhit import extractors
from vqhit.files import sha256


class _Fresh(FeatureExtractorInceptionV3):
    def load_state_dict(self, state):
        """Keep the initial weights."""


def write_random_inception(path):
    """Write its weights; scaled so that activations stay alive and logits differ between images."""
    nothing = BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = _Fresh("fresh", ["2048"], feature_extractor_weights_path=nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    network.fc.weight.mul_(10)
    torch.save(network.state_dict(), path)


def known_as_published(path):
    """The pinned file, with the hash of this one."""
    return dataclasses.replace(extractors.INCEPTION, sha256=sha256(path))


class Differences(torch.nn.Module):
    """A quick metric in LPIPS' place."""

    def per_image(self, reconstruction, images):
        return (reconstruction - images).abs().mean((1, 2, 3))


class Colours(torch.nn.Module):
    """A quick network in Inception's place: mean colours as features, and as the logits of three classes."""

    dim, classes, is_fid = 3, 3, True

    def forward(self, images):
        colours = images.float().mean((2, 3))
        return extractors.Extracted(colours, colours / 20)
