"""The command `vqhit eval`."""

import json
import os
from pathlib import Path
from typing import Annotated, get_args

import typer

from vqhit.options import Device, MaxBad


def evaluate(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder, OWNER/NAME[@REVISION] on the Hub, or a packaged model.")
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
    from vqhit.hub import WEIGHTS_FILE, locate, select_device
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
        with distributed.first_here():
            located = locate(model)
        loaded = load_model(located.folder, device=device)
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
        results = {
            "model": located.name,
            "commit": located.commit,
            "model_sha256": sha256(located.folder / WEIGHTS_FILE),
            **results,
        }
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
