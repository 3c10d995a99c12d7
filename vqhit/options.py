"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: train.steps=1000.")]
ModelDir = Annotated[str, typer.Option("--model", help="Model folder, or vqhit-tiny-64, which is in the package.")]
GeneratorDir = Annotated[str, typer.Option("--model", help="Model folder, or hit-tiny-64, which is in the package.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
TrainSplit = Annotated[str | None, typer.Option("--split", help="Of a data set that has splits; train if not set.")]
ImageColumn = Annotated[str | None, typer.Option("--image-column", help="Found if not set.")]
MaxBad = Annotated[float, typer.Option("--max-bad", help="Share of unreadable images that stops it.")]
DecodedAtATime = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images at a time, which rounds them; 1 on the CPU, else 32."),
]
