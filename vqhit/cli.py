"""The `vqhit` command. Heavy imports stay inside the commands, so that `--help` is quick."""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

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
        sys.stderr.write(f"vqhit: {process}{' '.join(str(error).split())}\n")
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


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Option("--model", help="Model folder, or vqhit-tiny-64 or hit-tiny-64 of the package.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Images: a folder, a `datasets` folder, or a Hub id.")
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Instead of a model: pictures that anything else has made.")
    ] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Images to compare --images with.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="Of rfid,fid,is,psnr,ssim,lpips,codebook; all that apply and can be had."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Evaluate this many images, evenly spaced.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a data set; by default validation.")] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=1, max=4096, help="Of --images: cut them to so many px.")
    ] = None,
    crop_proportion: Annotated[
        float, typer.Option("--crop-proportion", help="Of a reference set: below 1, the middle of the short side.")
    ] = 1.0,
    max_bad: MaxBad = 0.01,
    samples: Annotated[
        int | None, typer.Option("--samples", min=2, help="Of a generator: draw so many; 50,000 if not set.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the samples; 0 if not set.")] = None,
    stats: Annotated[
        str | None, typer.Option("--stats", help=".npz with mu and sigma of the reference, instead of its images.")
    ] = None,
    save_stats: Annotated[
        str | None, typer.Option("--save-stats", help="Write those of this reference set, for --stats.")
    ] = None,
    inception: Annotated[
        str | None, typer.Option("--inception", help="File of FID's network, if not in torchvision's cache.")
    ] = None,
    lpips: Annotated[
        str | None, typer.Option("--lpips", help="File of torchvision's VGG16, if not in its cache.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option("--features", help="Weights (.pth, .safetensors) of another network in FID's place: not FID."),
    ] = None,
    features_kind: Annotated[
        str | None,
        typer.Option("--features-kind", help="That network: squeezenet1_1, vgg16, or a YAML file (configs/features)."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="JSON file to write; the codebook's histogram goes beside it.")
    ] = Path("eval.json"),
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, help="Loader processes; by default one less than cores, at most 8."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure a tokenizer (rFID, IS, PSNR, SSIM, LPIPS, codebook), a generator (FID, IS), or --images of anything.

    The JSON file says by which protocol. With several processes: torchrun --nproc-per-node 8 -m vqhit eval ...

    Example: vqhit eval --model vqhit-tiny-64 --data /data/imagenet/val --metrics psnr,ssim,codebook --limit 1000
    """
    from vqhit import distributed
    from vqhit.comparison import Metric
    from vqhit.evaluate import evaluate_generator, evaluate_pictures, evaluate_tokenizer
    from vqhit.extractors import features_kind as network_of
    from vqhit.files import sha256, write_atomic
    from vqhit.hub import WEIGHTS_FILE, find_model, select_device
    from vqhit.models import VQHiT, load_model
    from vqhit.protocol import EvaluationSettings
    from vqhit.tables import evaluation_rows, print_table

    if (model is None) == (images is None):
        raise ValueError(f"{'both given' if model else 'nothing to measure'}: one of --model and --images is needed")
    if (features is None) != (features_kind is None):
        missing = "--features" if features is None else "--features-kind"
        raise ValueError(f"{missing} is missing: a network takes both, a file of weights and what network they are of")
    others = {"--reference": reference, "--size": size} if images is None else {"--data": data}
    for option, value in others.items():
        if value is not None:
            raise ValueError(f"{option} goes with {'--images' if images is None else '--model'}")
    picture = out.with_name(f"{out.stem}_codebook.png")
    _check_outputs(
        [out, picture, *([] if save_stats is None else [Path(save_stats)])],
        inputs=[stats, inception, lpips, features, features_kind, data, images, reference, *_files_of(model)],
        images=data,
    )
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    if names is not None and (unknown := [name for name in names if name not in get_args(Metric)]):
        raise ValueError(f"--metrics: found {unknown[0]!r}; allowed: {', '.join(get_args(Metric))}")
    device = distributed.start(device, timeout_minutes=60)
    if workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = max(0, min(8, (os.cpu_count() or 1) // processes - 1))
    settings = EvaluationSettings.from_dict(
        {
            "metrics": names,
            "split": split,
            "limit": limit,
            "crop_proportion": crop_proportion,
            "batch_size": batch_size,
            "workers": workers,
            "inception": inception,
            "lpips": lpips,
            "stats": stats,
            "save_stats": save_stats,
            "features": None if features is None else network_of(str(features_kind), features),
            "feature_weights": features,
            "codebook_picture": str(picture),
            "max_bad": max_bad,
            **({} if samples is None else {"samples": samples}),
            **({} if seed is None else {"seed": seed}),
        }
    )
    if images is not None:
        if samples is not None or seed is not None:
            raise ValueError("--samples and --seed are of a generator; give its --model")
        results = evaluate_pictures(images, reference, settings, size=size, device=select_device(device))
        title = f"{results['images']} pictures of {images}"
    else:
        assert model is not None
        loaded = load_model(model, device=device)
        if isinstance(loaded, VQHiT):
            if samples is not None or seed is not None:
                raise ValueError(f"{model}: a tokenizer; --samples and --seed are of a generator")
            if data is None:
                raise ValueError("--data is missing: the images to reconstruct")
            results = evaluate_tokenizer(loaded, data, settings)
            title = f"{model} on {results['images']} images of {data}"
        else:
            results = evaluate_generator(loaded, data, settings)
            title = f"{results['samples']} samples of {model}"
        results = {"model": model, "model_sha256": sha256(find_model(model) / WEIGHTS_FILE), **results}
    if distributed.is_first():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
        print_table(title, evaluation_rows(results))
        for metric, reason in results["left_out"].items():
            print(f"left out: {metric} ({reason})")
        if results["skipped"]:
            print(f"{results['skipped']} images cannot be read; {out} lists them")
        if "codes_used" in results:
            print(f"{picture}: how often each code is chosen")
        print(f"{out}: the same, with the protocol")
    distributed.stop()


def _files_of(model: str | None) -> list[str]:
    """The files of a model's folder, if it is one."""
    from vqhit.hub import CONFIG_FILE, WEIGHTS_FILE

    return [] if model is None else [str(Path(model) / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]


def _check_outputs(outputs: list[Path], inputs: list[str | None], images: str | None) -> None:
    """Raise `ValueError`, before long work, for files that cannot be written or must not be overwritten."""
    from vqhit.files import check_writable

    places = [Path(os.path.realpath(path)) for path in outputs]
    taken = {Path(os.path.realpath(path)) for path in inputs if path is not None}
    for path, place in zip(outputs, places, strict=True):
        check_writable(path)
        if places.count(place) > 1:
            raise ValueError(f"{path}: would be written twice; give --out and --save-stats different names")
        if place in taken:
            raise ValueError(f"{path}: would overwrite a file that is read; choose another name")
        if images is not None and path.suffix == ".png" and Path(images).resolve() in place.parents:
            raise ValueError(f"{path}: would become one of the images of {images}; give an --out elsewhere")


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
    from vqhit.generator import Generator
    from vqhit.images import image_grid, rows_of, to_uint8, uint8_to_pil
    from vqhit.models import load_model
    from vqhit.progress import ProgressBar

    generator = load_model(model, device=device)
    if not isinstance(generator, Generator):
        raise ValueError(f"{model}: a {type(generator).__name__}, not a generator")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: {'not empty' if out.is_dir() else 'a file'}; --out is a new or empty folder")
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


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="generators: those of the paper's Tables 4, 5 and 6.")],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")] = Path("bench.json"),
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 4,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each model is timed.")] = 5,
    device: Device = "auto",
) -> None:
    """Time models side by side: one process, in turns, random weights; the paper's numbers beside ours.

    Example: vqhit bench generators
    """
    from vqhit.bench import bench_generators
    from vqhit.files import check_writable, write_atomic
    from vqhit.hub import select_device
    from vqhit.tables import bench_row, print_table

    if what != "generators":
        raise ValueError(f"found {what!r}; allowed: generators")
    check_writable(out)
    results = bench_generators(device=select_device(device), batch_size=batch_size, rounds=rounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(results, indent=2) + "\n").encode())
    title = f"{results['protocol']['device']}, batch {batch_size}, eager float32, {rounds} rounds in turns"
    print_table(title, [bench_row(row) for row in results["generators"]])
    print(f"{out}: the same, with the protocol")


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
def reconstruct(
    photos: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files, of any size and mode.")],
    model: ModelDir,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
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
    originals = [tokenizer.preprocess(photo) for photo in photos]  # all of them, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with ProgressBar("reconstruct", len(photos)) as bar:
        for target, original in zip(targets, originals, strict=True):
            pair = torch.cat([original, tokenizer.reconstruct(original)])
            image_grid([list(to_uint8(pair))]).save(target)
            bar.advance(1)
    print(f"{out}: {len(photos)} pictures, each original beside its reconstruction from {tokenizer.num_tokens} tokens")
