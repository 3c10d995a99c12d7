"""Tokens back to images: the rows of a folder that `vqhit tokenize` wrote, decoded to PNG files."""

import itertools
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqhit.files import check_apart, check_new_folder, write_atomic
from vqhit.folder import DataError
from vqhit.images import to_uint8, uint8_to_pil
from vqhit.models import VQHiT
from vqhit.progress import ProgressBar
from vqhit.token_folder import MANIFEST, TokenFolder, digest
from vqhit.token_shards import read_shard, summary
from vqhit.tokenize import load_identified

_GPU_BATCH = 32


def detokenize(
    folder: Path | str,
    destination: Path | str,
    *,
    model: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Decode all rows of a folder of tokens, or the first `limit`, to 000000.png, 000001.png, ...; returns how many.

    The tokenizer is the one that the manifest names, with the very weights, or `model`: any with as many codes and the
    same grid, which a warning tells if its weights are others. Images are decoded one at a time on the CPU, else 32, if
    `batch_size` does not say. Everything is checked before anything is written. Raises `DataError` for tokens that are
    incomplete, damaged or out of range, and `ValueError` for a model that does not fit or a folder that is not empty.
    """
    target = Path(destination)
    check_apart(str(folder), target)
    check_new_folder(target)
    tokens = TokenFolder(folder)
    manifest = _complete_manifest(tokens)
    shards = [summary(path) for path in _shards(tokens, manifest)]
    for path, shard in zip(_shards(tokens, manifest), shards, strict=True):
        if shard.made != digest(manifest):
            raise DataError(f"{path}: no shard of these tokens; move it away and tokenize again")
    if (rows := sum(shard.rows for shard in shards)) != manifest["rows"]:
        raise DataError(f"{tokens.path}: {rows} rows; {MANIFEST} says {manifest['rows']}")
    count = rows if limit is None else min(limit, rows)
    for _ in _rows(tokens, manifest, count):  # all, before any is decoded
        pass
    tokenizer = _tokenizer(manifest, model, device)
    step = batch_size or (1 if tokenizer.quant_conv.weight.device.type == "cpu" else _GPU_BATCH)
    target.mkdir(parents=True, exist_ok=True)
    number = 0
    with ProgressBar("detokenize", count, images=True) as bar:
        for some in _rows(tokens, manifest, count):
            for batch in torch.from_numpy(some).split(step):
                images = tokenizer.decode(batch.to(tokenizer.quant_conv.weight.device))
                for image in to_uint8(images).cpu():
                    file = BytesIO()
                    uint8_to_pil(image).save(file, "PNG")
                    write_atomic(target / f"{number:06d}.png", file.getvalue())
                    number += 1
                bar.advance(len(batch))
    return number


def _complete_manifest(tokens: TokenFolder) -> dict[str, Any]:
    manifest = tokens.manifest()
    if manifest is None:
        raise DataError(f"{tokens.path}: no {MANIFEST} in it; expected a folder that vqhit tokenize wrote")
    if not manifest["complete"]:
        raise DataError(f"{tokens.path}: not complete; the command that began it goes on with it")
    return manifest


def _shards(tokens: TokenFolder, manifest: dict[str, Any]) -> Iterator[Path]:
    return (tokens.shard(number, manifest["shards"]) for number in range(manifest["shards"]))


def _tokenizer(manifest: dict[str, Any], model: str | None, device: torch.device | str) -> VQHiT:
    """The model that made the tokens, or one that fits them."""
    made_by = manifest["model"]
    expected, commit = made_by.get("weights_sha256"), made_by.get("revision")
    name = f"{made_by.get('id')}@{commit}" if commit else str(made_by.get("id"))
    try:
        tokenizer, found = load_identified(model or name, device=device)
    except ValueError as error:
        raise ValueError(f"{error}" if model else f"{error}; --model says where the tokenizer is") from None
    same = found.weights_sha256 == expected
    if model is None and not same:
        raise ValueError(
            f"{name}: not the weights that made these tokens, sha256 {found.weights_sha256[:16]}... instead of "
            f"{str(expected)[:16]}...; --model takes another tokenizer all the same"
        )
    grid = "x".join(map(str, manifest["token_grid"]))
    own_grid = "x".join(map(str, tokenizer.token_grid))
    if (tokenizer.codebook_size, own_grid) != (manifest["codebook_size"], grid):
        raise ValueError(
            f"{found.id}: {tokenizer.codebook_size} codes, {own_grid} tokens an image; these tokens are {grid} of "
            f"{manifest['codebook_size']} codes"
        )
    if not same and found.tokens_sha256 != made_by.get("tokens_sha256"):
        warnings.warn(f"{found.id}: not the encoder and codebook that made these tokens", stacklevel=3)
    return tokenizer


def _rows(tokens: TokenFolder, manifest: dict[str, Any], count: int) -> Iterator[np.ndarray]:
    """The first `count` rows, shard by shard: (rows, h*w) int64, checked."""
    import pyarrow

    height, width = manifest["token_grid"]
    last = (-1, 0)
    for path in _shards(tokens, manifest):
        table = read_shard(path, ["tokens", "height", "width", "index", "view"]).slice(0, count)
        for column in ("index", "view"):
            if not pyarrow.types.is_integer(table[column].type) or table[column].null_count:
                raise DataError(f"{path}: {column}: found {table[column].type} or nulls; expected integers")
        order = [last, *zip(table["index"].to_pylist(), table["view"].to_pylist(), strict=True)]
        if any(before >= after for before, after in itertools.pairwise(order)):
            raise DataError(f"{path}: its rows are not in the order of their images; tokenize again to mend the folder")
        last = order[-1]
        for column, expected in (("height", height), ("width", width)):
            if len(others := set(table[column].unique().to_pylist()) - {expected}):
                raise DataError(f"{path}: {column} {others.pop()}; {MANIFEST} says {expected}")
        kind = table["tokens"].type
        if not (pyarrow.types.is_fixed_size_list(kind) and pyarrow.types.is_integer(kind.value_type)):
            raise DataError(f"{path}: tokens are {kind}; expected lists of integers")
        flat = table["tokens"].combine_chunks().flatten()
        if flat.null_count or len(flat) != len(table) * height * width:
            raise DataError(f"{path}: {len(flat)} tokens in {len(table)} rows; a row has {height * width}")
        some = flat.to_numpy(zero_copy_only=False)
        if len(some) and not (some.min() >= 0 and some.max() < manifest["codebook_size"]):
            raise DataError(
                f"{path}: tokens range from {some.min()} to {some.max()}; allowed: 0 to {manifest['codebook_size'] - 1}"
            )
        yield some.astype(np.int64).reshape(-1, height * width)
        if (count := count - len(table)) == 0:
            return
