"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: train.steps=1000.")]
ModelDir = Annotated[str, typer.Option("--model", help="Folder, OWNER/NAME[@REVISION] of the Hub, or vqhit-tiny-64.")]
GeneratorDir = Annotated[str, typer.Option("--model", help="Folder, OWNER/NAME[@REVISION] of the Hub, or hit-tiny-64.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
