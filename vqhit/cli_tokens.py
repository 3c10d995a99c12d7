"""The commands `vqhit tokenize` and `vqhit detokenize`."""

from pathlib import Path
from typing import Annotated

import typer

from vqhit.options import DecodedAtATime, Device, ImageColumn, MaxBad, ModelDir, TrainSplit

_LONGEST_SHARE_MINUTES = 7 * 24 * 60  # a process that is done waits for the slowest


def tokenize(
    model: ModelDir,
    data: Annotated[str, typer.Option("--data", help="Images: a folder, a `datasets` folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write, or to go on with.")],
    split: TrainSplit = None,
    image_column: ImageColumn = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a data set on the Hub.")] = None,
    views: Annotated[
        str, typer.Option("--views", help="Crops of each image: none (the center crop alone), flip or ten-crop.")
    ] = "none",
    precision: Annotated[str, typer.Option("--precision", help="Of the encoder: float32 or bfloat16.")] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Crops at a time.")] = 32,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Loader processes of each process.")] = 0,
    images_per_shard: Annotated[int, typer.Option("--images-per-shard", min=1, help="Images of a file.")] = 2048,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Tokenise this many images, evenly spaced.")
    ] = None,
    max_bad: MaxBad = 0.01,
    device: Device = "auto",
) -> None:
    """Write the tokens of images into Parquet files that `datasets` opens; the same command continues one that stopped.

    With several processes: torchrun --nproc-per-node 8 -m vqhit tokenize ...

    Example: vqhit tokenize --model vqhit-tiny-64 --data /data/imagenet/train --out tokens --workers 4
    """
    from signal import Signals

    from vqhit import distributed
    from vqhit.progress import say
    from vqhit.tokenize import TokenizeConfig, load_identified
    from vqhit.tokenize import tokenize as write_tokens

    config = TokenizeConfig.from_dict(
        {
            "path": data,
            "split": split,
            "revision": revision,
            "image_column": image_column,
            "views": views,
            "precision": precision,
            "batch_size": batch_size,
            "workers": workers,
            "images_per_shard": images_per_shard,
            "limit": limit,
            "max_bad": max_bad,
        }
    )
    device = distributed.start(device, timeout_minutes=_LONGEST_SHARE_MINUTES)
    show = say if distributed.is_first() else lambda _: None
    tokenizer, identity = load_identified(model, device=device)
    result = write_tokens(tokenizer, config, out, identity=identity)
    if isinstance(result, Signals):
        show(f"{result.name}: stopped; the files that are complete stay, the same command continues")
        raise typer.Exit(128 + result)
    distributed.stop()
    height, width = result["token_grid"]
    left_out = f"; {result['skipped']} left out, listed in skipped.jsonl" if result["skipped"] else ""
    rows = f"{result['rows']} rows of {height}x{width} tokens from {result['images']} images{left_out}"
    show(f"{out}: {rows}")


def detokenize(
    tokens: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `vqhit tokenize` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures, new or empty.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Another tokenizer, of as many codes; by default the manifest's.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Decode the first rows only.")] = None,
    batch_size: DecodedAtATime = None,
    device: Device = "auto",
) -> None:
    """Decode tokens to pictures, as 000000.png, 000001.png, ... in the order of their rows.

    Example: vqhit detokenize tokens --out pictures --limit 64
    """
    from vqhit.detokenize import detokenize as write_pictures

    count = write_pictures(tokens, out, model=model, limit=limit, batch_size=batch_size, device=device)
    print(f"{out}: {count} pictures")
