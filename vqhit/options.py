"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: train.steps=1000.")]
ModelDir = Annotated[str, typer.Option("--model", help="Model folder, or vqhit-tiny-64, which is in the package.")]
GeneratorDir = Annotated[str, typer.Option("--model", help="Model folder, or hit-tiny-64, which is in the package.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
