"""`vqhit convert`: tokenizers of other projects, as folders of our own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vqhit.models import VQHiT

convert = typer.Typer(
    name="convert",
    help="Make a model's folder of another project's checkpoint. Nothing in the file is executed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Out = Annotated[Path, typer.Option("--out", help="Folder for the model, new or empty.")]


@convert.command()
def taming(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Lightning checkpoint of a VQModel.")],
    config: Annotated[Path, typer.Option("--config", help="Its YAML file, model.yaml or *-project.yaml.")],
    out: _Out,
) -> None:
    """Convert a VQGAN of taming-transformers, f16 with 1024 or 16384 codes or of other sizes.

    Example: vqhit convert taming last.ckpt --config model.yaml --out vqgan-f16-1024
    """
    from vqhit.convert_vqgan import taming_vqgan
    from vqhit.files import check_new_folder

    check_new_folder(out)
    _write(taming_vqgan(checkpoint, config), checkpoint, out, "taming-transformers")


@convert.command()
def llamagen(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="vq_ds16_c2i.pt, vq_ds8_c2i.pt or the like.")],
    out: _Out,
    weights: Annotated[str, typer.Option("--weights", help="model (LlamaGen's tokens are its) or ema.")] = "model",
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Side of the images in px.")] = 256,
) -> None:
    """Convert a VQ tokenizer of LlamaGen, VQ-16 or VQ-8.

    Example: vqhit convert llamagen vq_ds16_c2i.pt --out llamagen-vq16
    """
    from vqhit.convert_vqgan import llamagen_vq
    from vqhit.files import check_new_folder

    check_new_folder(out)
    _write(llamagen_vq(checkpoint, weights=weights, image_size=image_size), checkpoint, out, "LlamaGen", weights)


def _write(model: "VQHiT", checkpoint: Path, out: Path, project: str, weights: str | None = None) -> None:
    from vqhit.files import new_folder, sha256
    from vqhit.origin import Origin, write_origin

    origin = Origin(project, checkpoint.name, sha256(checkpoint), weights)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        write_origin(folder, origin)
    (height, width), size = model.token_grid, model.config.image_size
    grid = f"{height}x{width} tokens ({model.num_tokens} per image) of {model.codebook_size:,} codes"
    print(f"{out}: {size}x{size} px, {grid}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    print(f"converted from {origin.text}")
