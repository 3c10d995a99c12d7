"""The `vqhit` command. Heavy imports stay inside the commands, so that `--help` is quick."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from vqhit.cli_bench import bench
from vqhit.cli_convert import convert
from vqhit.cli_eval import evaluate
from vqhit.cli_export import export
from vqhit.cli_tokens import detokenize, tokenize
from vqhit.options import (
    DecodedAtATime,
    Device,
    GeneratorDir,
    ImageColumn,
    MaxBad,
    ModelDir,
    Overrides,
    TrainSplit,
)

app = typer.Typer(
    name="vqhit",
    help="Image tokenizers and generators on HiT: train, evaluate, use. VQHIT_TRACEBACK=1 shows an error's origin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_OTHERS_FIRST_S = 3.0


def main() -> None:
    """Run the command; an error that the user can mend is one line on standard error and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        # torch: out of memory on the CPU is a bare RuntimeError, and so is a loader process that was killed
        known = any(text in str(error) for text in ("memory", "DataLoader worker"))
        if os.environ.get("VQHIT_TRACEBACK") or (isinstance(error, RuntimeError) and not known):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank and type(error).__name__ == "SharedError":
            sys.exit(2)
        if rank:  # what all processes raise, the first tells: torchrun ends this one then
            time.sleep(_OTHERS_FIRST_S)
        process = f"process {rank}: " if rank else ""
        text = "".join(
            letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(str(error).split())
        )
        sys.stderr.write(f"vqhit: {process}{text}\n")
        sys.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"vqhit: warning: {message}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from vqhit import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    overrides: Overrides = None,
    train: Annotated[bool, typer.Option("--train", help="Train a small tokenizer first; KEY=VALUE change it.")] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of photographs and results; --train writes its subfolder `trained`.")
    ] = Path("demo"),
) -> None:
    """Reconstruct photographs with the tokenizer that comes with the package.

    With --train, train a small one on other photographs first, in minutes on two CPU cores; run again, it is reused.

    Example: vqhit demo
    """
    from signal import Signals

    from rich.console import Console

    from vqhit.demo import demo_config, print_results, run_demo, train_demo

    if overrides and not train:
        raise ValueError(f"{overrides[0]!r} changes a training run; add --train")
    out = out / "trained" if train else out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file; --out is a folder")
    results = train_demo(demo_config(out, overrides or []), out) if train else run_demo(out)
    if isinstance(results, Signals):
        print(f"{results.name}: training stopped; the same command continues")
        raise typer.Exit(128 + results)
    print_results(results, Console())
    print(f"{out / 'reconstruction.png'}: originals above reconstructions")
    print(f"{out / 'results.json'}: these numbers; {results['model']}: the model, for VQHiT.from_pretrained")


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of images, `datasets` folder, or id on the Hub.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    size: Annotated[int, typer.Option("--size", min=1, help="Side of the training crops in px.")] = 256,
    crop_proportion: Annotated[float, typer.Option("--crop-proportion", help="Their share of the short side.")] = 0.875,
    image_format: Annotated[str, typer.Option("--format", help="jpeg, png or webp.")] = "jpeg",
    quality: Annotated[int, typer.Option("--quality", min=1, max=100, help="Of JPEG and WebP.")] = 95,
    split: TrainSplit = None,
    image_column: ImageColumn = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    max_bad: MaxBad = 0.01,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Loader processes.")] = 0,
) -> None:
    """Resize images once, so that training crops need no resampling, into a folder that `datasets` opens.

    Example: vqhit prepare /data/imagenet/train /data/imagenet256 --size 256 --workers 8
    """
    from vqhit.prepare import PrepareConfig
    from vqhit.prepare import prepare as write_prepared

    config = PrepareConfig(
        path=source,
        split=split,
        revision=revision,
        image_column=image_column,
        size=size,
        crop_proportion=crop_proportion,
        format=image_format,
        quality=quality,
        max_bad=max_bad,
        workers=workers,
    )
    report = write_prepared(config, destination)
    left_out = f"; {report['skipped']} left out, listed in skipped.txt" if report["skipped"] else ""
    print(f"{destination}: {report['images']} images of short side {report['short_side_px']} px{left_out}")


@app.command()
def train(config: Annotated[Path, typer.Argument(help="YAML file of the run.")], overrides: Overrides = None) -> None:
    """Train a tokenizer or a generator; the same command continues a run that was stopped.

    SIGTERM, SIGUSR1 and Ctrl-C end it after the step that is under way, with a checkpoint; the exit code is then 128
    and the signal's number. With several processes: torchrun --nproc-per-node 8 -m vqhit train ...

    Example: vqhit train configs/vqhit_imagenet256.yaml data.path=/data/imagenet/train train.batch_size=64
    """
    from vqhit import distributed
    from vqhit.progress import say
    from vqhit.recipe import RunConfig
    from vqhit.train import Trainer

    trainer = Trainer(RunConfig.from_yaml(config, overrides or []))
    show = say if distributed.is_first() else lambda _: None
    if trainer.state.step:
        order = ", the stream in another order" if trainer.feed.count is None else ""
        show(f"continuing {trainer.folder.path} at step {trainer.state.step}{order}")
    folder = trainer.run()
    distributed.stop()
    if folder is not None:
        show(f"{folder}: the trained model")
    elif trainer.stopped_by is None:
        show(f"stopped at step {trainer.state.step}; the same command continues")
    else:
        show(f"{trainer.stopped_by.name}: stopped at step {trainer.state.step}, saved; the same command continues")
        raise typer.Exit(128 + trainer.stopped_by)


app.command("eval")(evaluate)


@app.command()
def sample(
    model: GeneratorDir,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures, new or empty.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of pictures.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Picture i depends on it and on i alone.")] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="Also all of them in one picture, grid.png.")] = False,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Each picture a strip of 8, from one noise vector to another.")
    ] = False,
    batch_size: DecodedAtATime = None,
    device: Device = "auto",
) -> None:
    """Draw images from a generator, as 000000.png, 000001.png, ...

    Example: vqhit sample --model hit-tiny-64 --n 64 --seed 0 --out samples --grid
    """
    from vqhit.files import check_new_folder
    from vqhit.generator import Generator
    from vqhit.images import image_grid, rows_of, to_uint8, uint8_to_pil
    from vqhit.models import load_model
    from vqhit.progress import ProgressBar

    generator = load_model(model, device=device)
    if not isinstance(generator, Generator):
        raise ValueError(f"{model}: a {type(generator).__name__}, not a generator")
    check_new_folder(out)
    if interpolate:
        ends = (generator.noise(range(first, 2 * n, 2), seed=seed) for first in (0, 1))
        pairs = zip(*ends, strict=True)
        drawn = (generator.interpolate(z0, z1, batch_size=batch_size).cpu() for z0, z1 in pairs)
    else:
        drawn = (image for images in generator.samples(range(n), seed=seed, batch_size=batch_size) for image in images)
    out.mkdir(parents=True, exist_ok=True)
    kept = []
    with ProgressBar("sample", n) as bar:
        for number, images in enumerate(drawn):
            image = to_uint8(images).cpu()
            picture = image_grid([list(image)], gap_px=0) if interpolate else uint8_to_pil(image)
            picture.save(out / f"{number:06d}.png")
            if grid:
                kept.append(image)
            bar.advance(1)
    if grid:
        image_grid([list(strip) for strip in kept] if interpolate else rows_of(kept)).save(out / "grid.png")
    print(f"{out}: {n} pictures{', and grid.png of all' if grid else ''}")


app.command()(tokenize)
app.command()(detokenize)
app.add_typer(convert)
app.command()(export)
app.command()(bench)


@app.command()
def doctor(
    data: Annotated[
        str | None, typer.Option("--data", help="Also open these images: a folder, a `datasets` folder, or a Hub id.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a data set; by default validation.")] = None,
) -> None:
    """List what this machine has of what vqhit can use, and how to get what is missing. Downloads nothing.

    Example: vqhit doctor --data /data/imagenet/val
    """
    from vqhit.doctor import examine

    found = []
    for finding in examine(data, split):
        found.append(finding.state)
        print(f"{finding.state:8}{finding.what}: {' '.join(finding.found.split())}", flush=True)
        if finding.fix:
            print(f"{'':8}fix: {finding.fix}", flush=True)
    print(f"{found.count('ok')} found, {found.count('missing')} missing, {found.count('wrong')} wrong")
    if "wrong" in found:
        raise typer.Exit(1)


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_DIR", help="Folder of a run, a checkpoint or a model.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hugging Face Hub; made if new.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it private; refused if it is there and public.")
    ] = False,
    branch: Annotated[str | None, typer.Option("--branch", help="Made if new; main if not set.")] = None,
    with_training_state: Annotated[
        bool, typer.Option("--with-training-state", help="Also discriminator and optimizers, for init_from=OWNER/NAME.")
    ] = False,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="JSON of `vqhit eval`; eval.json in the folder if not set. May be repeated."),
    ] = None,
    no_grid: Annotated[bool, typer.Option("--no-grid", help="Leave out the run's last grid of pictures.")] = False,
    license: Annotated[str | None, typer.Option("--license", help="The Hub's identifier: apache-2.0, mit, ...")] = None,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload a model of vqhit",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and card; ask nothing of the Hub.")] = False,
) -> None:
    """Publish a model on the Hugging Face Hub, in one commit: configuration, weights, and a card made from its run.

    The token is that of `hf auth login`, or HF_TOKEN. An older push's files that this one has not are removed.

    Example: vqhit push runs/vqhit_imagenet256 user/vqhit-b-256 --license cc-by-nc-4.0
    """
    from vqhit.publish import package

    found = package(
        source,
        repository,
        branch=branch,
        license=license,
        evaluations=evaluations or (),
        grid=not no_grid,
        with_training_state=with_training_state,
    )
    for name, content in found.files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{name}: {size:,} bytes")
    for remark in found.remarks:
        print(f"note: {remark}")
    if dry_run:
        print(f"\n{found.card}")
        return
    print(found.push(repository, branch=branch, private=private, message=message))


@app.command()
def reconstruct(
    photos: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files, of any size and mode.")],
    model: ModelDir,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Side of the center crops in px; the model's own if not set.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Encode and decode photographs; writes each one's center crop beside its reconstruction as NAME.png.

    Example: vqhit reconstruct cat.jpg dog.webp --model vqhit-tiny-64 --out pictures
    """
    import torch

    from vqhit.images import image_grid, to_uint8
    from vqhit.models import VQHiT
    from vqhit.progress import ProgressBar

    tokenizer = VQHiT.from_pretrained(model, device=device)
    targets = [out / f"{photo.stem}.png" for photo in photos]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"two photographs would both be written to {target}; give them in two calls")
        if any(target.resolve() == photo.resolve() for photo in photos):
            raise ValueError(f"{target}: would overwrite a photograph; choose another --out")
    originals = [tokenizer.preprocess(photo, size) for photo in photos]  # all of them, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with ProgressBar("reconstruct", len(photos)) as bar:
        for target, original in zip(targets, originals, strict=True):
            tokens = tokenizer.encode(original)
            pair = torch.cat([original, tokenizer.decode(tokens)])
            image_grid([list(to_uint8(pair))]).save(target)
            bar.advance(1)
    print(f"{out}: {len(photos)} pictures, each original beside its reconstruction from {tokens.numel()} tokens")
