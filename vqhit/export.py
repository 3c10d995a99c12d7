"""A tokenizer's encoder and decoder as files that run without vqhit: programs of `torch.export`, or ONNX.

An encoder takes images (B, 3, H, W) float32 in [-1, 1] to tokens (B, h, w) int64, a decoder those to images, clamped.
B is free, all else the model's own. Every file is run before it is kept, and compared with the model in eager mode.
"""

import copy
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqhit import __version__
from vqhit.files import check_new_folder, new_folder
from vqhit.models import VQHiT
from vqhit.tokenize import ModelIdentity, load_identified
from vqhit.vector_quantize import SimVQ

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
"""Of the files of each format."""
PARTS = ("encoder", "decoder")
REPORT_FILE = "export.json"
_TRACED_BATCH = 2
_CHECKED_BATCHES = (1, 3)
IMAGE_TOLERANCE = 1e-4
TOKEN_TOLERANCE = 1e-3
"""Share of tokens that may differ, one at least: a latent as near to two codes goes to one or the other by rounding."""
_FREE_BATCH = ({0: torch.export.Dim("batch")},)
_ONE_FILE_BYTES = 1.9e9  # protobuf ends at 2 GiB


class EncoderPart(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> tokens (B, h, w) int64, without `VQHiT.encode`'s checks of values."""

    def __init__(self, model: VQHiT) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.quantizer = model.encoder, model.quant_conv, model.quantizer
        self.token_grid = model.token_grid

    def forward(self, images: Tensor) -> Tensor:
        latents = self.quant_conv(self.encoder(images))
        if not isinstance(self.quantizer, SimVQ):
            return self.quantizer(latents).tokens
        # its own forward pass fixes the batch size while it is traced
        distances = torch.cdist(latents.flatten(2).transpose(1, 2), self.quantizer.inner.codebook)
        return distances.argmin(-1).unflatten(1, self.token_grid)


class DecoderPart(nn.Module):
    """Tokens (B, h, w) int64 -> images (B, 3, H, W) clamped to [-1, 1], without `VQHiT.decode`'s checks of values."""

    def __init__(self, model: VQHiT) -> None:
        super().__init__()
        self.quantizer, self.codebook_size = model.quantizer, model.codebook_size
        self.parts = nn.ModuleList(model.decoder_parts)

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = self.parts
        tokens = torch.where(tokens < 0, self.codebook_size, tokens)  # ONNX would count from the end
        entering = first(self.quantizer.lookup(tokens))
        images = second(*entering) if isinstance(entering, tuple) else second(entering)
        return images.clamp(-1, 1)


def export(
    model: VQHiT | str,
    destination: Path | str,
    *,
    format: str = "torch",
    part: str = "both",
    identity: ModelIdentity | None = None,
) -> dict[str, Any]:
    """Write encoder.pt2 and decoder.pt2, or .onnx, in float32 and eval mode, and export.json; returns its content.

    `format` is torch or onnx; `part` encoder, decoder or both. `model` is a name that `from_pretrained` takes, or a
    tokenizer, of which `identity` may then say which it is. The files are run on batches of other sizes than the one
    traced; `check` says how far they are from eager mode, and is None for ONNX without onnxruntime. Nothing is left
    unless all is well. Raises `ValueError` for a folder that is not new or empty, a missing package, a model that
    is no tokenizer or cannot be exported, and a file that computes something else.
    """
    target = Path(destination)
    check_new_folder(target)
    for name, found, allowed in (("format", format, SUFFIXES), ("part", part, (*PARTS, "both"))):
        if found not in allowed:
            raise ValueError(f"{name}: found {found!r}; allowed: {', '.join(allowed)}")
    if format == "onnx" and any(find_spec(package) is None for package in ("onnx", "onnxscript")):
        raise ValueError("the onnx format needs other packages: pip install 'vqhit[onnx]'")
    if isinstance(model, str):
        model, identity = load_identified(model, device="cpu")
    eager = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    report, made = _describe(eager, format, identity), {}
    with new_folder(target) as folder:
        for name in PARTS if part == "both" else (part,):
            path = folder / f"{name}{SUFFIXES[format]}"
            interface = _interface(eager, name)
            description = json.dumps({**report, "part": name, **interface})
            try:
                (_write_onnx if format == "onnx" else _write_torch)(eager, name, path, description)
            except Exception as error:  # of any layer of torch's exporters
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"{name}: cannot be exported to {format} ({text})") from error
            files = {file.name: file.stat().st_size for file in sorted(folder.glob(f"{path.name}*"))}
            made[name] = {"files": files, **interface, "check": _check(eager, name, path)}
        report["parts"] = made
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return report


def load_runner(path: Path) -> Callable[[Tensor], Tensor] | None:
    """A written file as a function on the CPU, with torch's number of threads; None for ONNX without onnxruntime."""
    if path.suffix == SUFFIXES["torch"]:
        module = torch.export.load(path).module()
        return torch.no_grad()(lambda batch: module(batch))
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda batch: torch.from_numpy(session.run(None, {entry.name: batch.numpy()})[0])


def sample_inputs(model: VQHiT, part: str, count: int, seed: int = 0) -> Tensor:
    """Images that are smooth and a little noisy, in [-1, 1], or tokens, all random: what a part is checked with."""
    generator = torch.Generator().manual_seed(seed)
    if part == "decoder":
        return torch.randint(0, model.codebook_size, (count, *model.token_grid), generator=generator)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    size = model.config.image_size
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)


def _describe(model: VQHiT, format: str, identity: ModelIdentity | None) -> dict[str, Any]:
    packages = ("torch", "onnx", "onnxscript") if format == "onnx" else ("torch",)
    return {
        "vqhit_version": __version__,
        "format": format,
        "made_with": {package: version(package) for package in packages},
        "model": {
            "id": identity.id if identity else None,
            "revision": identity.commit if identity else None,
            "weights_sha256": identity.weights_sha256 if identity else None,
            "tokens_sha256": identity.tokens_sha256 if identity else None,
            "config": model.config.to_dict(),
        },
        "codebook_size": model.codebook_size,
    }


def _interface(model: VQHiT, part: str) -> dict[str, Any]:
    """What a part takes and gives."""
    size, last = model.config.image_size, model.codebook_size - 1
    images = {"name": "images", "shape": ["batch", 3, size, size], "dtype": "float32", "range": [-1, 1]}
    tokens = {"name": "tokens", "shape": ["batch", *model.token_grid], "dtype": "int64", "range": [0, last]}
    entry, result = (images, tokens) if part == "encoder" else (tokens, images)
    return {"input": entry, "output": result}


@torch.no_grad()
def _trace(model: VQHiT, part: str) -> torch.export.ExportedProgram:
    module = EncoderPart(model) if part == "encoder" else DecoderPart(model)
    batch = sample_inputs(model, part, _TRACED_BATCH)
    return torch.export.export(module.eval(), (batch,), dynamic_shapes=_FREE_BATCH)


def _write_torch(model: VQHiT, part: str, path: Path, description: str) -> None:
    torch.export.save(_trace(model, part), path, extra_files={REPORT_FILE: description})


def _write_onnx(model: VQHiT, part: str, path: Path, description: str) -> None:
    import onnx

    names = _interface(model, part)
    program = _trace(model, part)
    with redirect_stdout(StringIO()):  # onnxscript counts its rewrites there
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[names["input"]["name"]],
            output_names=[names["output"]["name"]],
            dynamic_shapes=_FREE_BATCH,  # its name
        )
    assert made is not None
    made.model.metadata_props["vqhit"] = description
    size = sum(tensor.numel() * tensor.itemsize for tensor in program.state_dict.values())
    made.save(path, external_data=size > _ONE_FILE_BYTES)
    onnx.checker.check_model(str(path), full_check=True)


def _check(model: VQHiT, part: str, path: Path) -> dict[str, Any] | None:
    """Run a file beside the model; raises `ValueError` unless both give the same."""
    run = load_runner(path)
    if run is None:
        return None
    runner = "onnxruntime" if path.suffix == SUFFIXES["onnx"] else "torch"
    differing, total, largest = 0, 0, 0.0
    for count in _CHECKED_BATCHES:
        batch = sample_inputs(model, part, count, seed=count)
        found, expected = run(batch), model.encode(batch) if part == "encoder" else model.decode(batch)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{path.name}: run by {runner} it gives {tuple(found.shape)} {found.dtype}; the model gives "
                f"{tuple(expected.shape)} {expected.dtype}"
            )
        differing, total = differing + int((found != expected).sum()), total + found.numel()
        largest = max(largest, float((found.double() - expected.double()).abs().nan_to_num(torch.inf).max()))
    if part == "encoder":
        wrong, said = differing > max(1, TOKEN_TOLERANCE * total), f"{differing} of {total} tokens are not the model's"
        result: dict[str, float] = {"tokens": total, "tokens_differing": differing}
    else:
        wrong, said = largest > IMAGE_TOLERANCE, f"images differ from the model's by up to {largest:.2g}"
        result = {"largest_difference": largest}
    if wrong:
        raise ValueError(f"{path.name}: wrong: run by {runner}, {said}; nothing is written")
    return {"run_by": f"{runner} {version(runner)}", "batch_sizes": list(_CHECKED_BATCHES), **result}
