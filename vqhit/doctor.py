"""What this machine has of what vqhit can use: packages, device, files of weights, the Hub; and how to get the rest."""

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from vqhit import __version__
from vqhit.extractors import INCEPTION
from vqhit.files import KnownFile, check_hash
from vqhit.folder import one_line
from vqhit.hub import PACKAGED
from vqhit.images import ImageError
from vqhit.perceptual import VGG16_CAFFE, VGG16_TORCHVISION
from vqhit.sources import SourceConfig, open_source

_WEIGHTS = (
    (INCEPTION, "rFID, FID and IS", "--inception"),
    (VGG16_TORCHVISION, "LPIPS", "--lpips, loss.perceptual_weights"),
    (VGG16_CAFFE, "the perceptual loss of the paper", "loss.perceptual_weights"),
)
_EXTRAS = {
    "skimage": ("demo", "the photographs of vqhit demo"),
    "onnx": ("onnx", "vqhit export --format onnx"),
    "onnxscript": ("onnx", "vqhit export --format onnx"),
    "onnxruntime": ("onnx", "checking what vqhit export --format onnx wrote"),
    "vector_quantize_pytorch": ("quantizers", "FSQ, LFQ, SimVQ, the rotation trick"),
    "tensorboard": ("tensorboard", "log.tensorboard"),
    "wandb": ("wandb", "log.wandb"),
}
_PACKAGES = ("torch", "torchvision", "taming-transformers", "lpips", "torch-fidelity", "datasets", "huggingface-hub")
_TIMEOUT_S = 10.0


class Finding(NamedTuple):
    """One thing that was looked for."""

    state: Literal["ok", "missing", "wrong"]
    what: str
    found: str
    fix: str = ""


def examine(data: str | None = None, split: str | None = None) -> Iterator[Finding]:
    """Look for everything, one thing after the other; for a data set only if it is named. Downloads nothing."""
    yield Finding("ok", "vqhit", f"{__version__}, Python {platform.python_version()}, {platform.system()}")
    for name in _PACKAGES:
        yield _package(name)
    yield _device()
    for module, (extra, use) in _EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        found = "there" if there else f"not there: needed for {use}"
        yield Finding("ok" if there else "missing", module, found, "" if there else f"pip install 'vqhit[{extra}]'")
    models = ", ".join(sorted(folder.name for folder in PACKAGED.glob("*/")))
    yield Finding("ok" if models else "wrong", "packaged models", models or "none", "" if models else "reinstall vqhit")
    for file, use, key in _WEIGHTS:
        yield _weights(file, use, key)
    yield _hub()
    if data is not None:
        yield _data(data, split)


def _package(name: str) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        return Finding("wrong", name, "not installed", "pip install vqhit, which installs it")


def _device() -> Finding:
    if not torch.cuda.is_available():
        found = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads; no GPU"
        if torch.version.cuda is None and torch.version.hip is None:
            return Finding("ok", "device", found, "for a GPU: a torch that is built for it (https://pytorch.org)")
        return Finding(
            "ok", "device", found, f"for a GPU: its driver (nvidia-smi); torch has CUDA {torch.version.cuda}"
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("ok", "device", f"CUDA {torch.version.cuda}: {', '.join(names)}")


def _weights(file: KnownFile, use: str, key: str) -> Finding:
    path = file.cached()
    what = f"weights of {use}"
    try:
        check_hash(path, file.sha256)
    except (ValueError, OSError):
        if path.exists():
            return Finding(
                "wrong", what, f"{path}: damaged, another file, or not readable", "remove it to download it again"
            )
        digits = file.sha256 + ("" if len(file.sha256) == 64 else "...")
        fix = f"downloaded from {file.url} when needed; without a network put it there, or name it in {key}"
        return Finding("missing", what, f"{path}: not there (sha256 {digits})", fix)
    return Finding("ok", what, f"{path}: sha256 as expected")


def _hub() -> Finding:
    """Whether the Hugging Face Hub answers, which models and data sets alike come from."""
    import huggingface_hub
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return Finding("missing", "Hugging Face Hub", "HF_HUB_OFFLINE is set: only what is in the cache", "unset it")
    try:
        for kind in ("models", "datasets"):
            huggingface_hub.get_session().get(f"{endpoint}/api/{kind}?limit=1", timeout=_TIMEOUT_S).raise_for_status()
    except Exception as error:  # of any layer of the network
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT; what is in the cache works with HF_HUB_OFFLINE=1"
        return Finding("missing", "Hugging Face Hub", f"{endpoint} does not answer ({one_line(error)[:120]})", fix)
    token = "with a token" if huggingface_hub.get_token() else "without a token: hf auth login, to publish"
    return Finding("ok", "Hugging Face Hub", f"{endpoint} answers for models and data sets; {token}")


def _data(data: str, split: str | None) -> Finding:
    try:
        source = open_source(SourceConfig(path=data, split=split), split="validation")
        source.read(0)
    except ImageError as error:
        return Finding("wrong", "data", str(error), "replace or remove that image; vqhit prepare lists all bad ones")
    except ValueError as error:
        return Finding(
            "wrong", "data", str(error), "name a folder of images, a `datasets` folder, or a Hub id, and --split"
        )
    return Finding("ok", "data", f"{Path(data) if Path(data).exists() else data}: {len(source)} images")
