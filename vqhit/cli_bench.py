"""The command `vqhit bench`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from vqhit.options import Device


class _Options(NamedTuple):
    device: Any
    """A torch.device."""
    batch_size: int | None
    rounds: int
    preset: str | None
    model: str | None
    precisions: list[str]
    compiled: bool | None


def _tokenizer(subjects: list[str], options: _Options) -> dict[str, Any]:
    from vqhit.bench_tokenizer import PRECISIONS, bench_tokenizer, check_known, random_tokenizer
    from vqhit.models import VQHiT

    if options.model is not None and options.preset is not None:
        raise ValueError(f"--model {options.model} and --preset {options.preset}: give one of them")
    check_known("--precision", options.precisions, PRECISIONS)
    on_cpu = options.device.type == "cpu"
    if options.model is None:
        preset = options.preset or "vqhit-b-256"
        name, model = f"{preset}, random weights", random_tokenizer(preset, options.device)
    else:
        name, model = options.model, VQHiT.from_pretrained(options.model, device=options.device)
    return bench_tokenizer(
        model,
        subjects,
        name=name,
        precisions=options.precisions or (["float32"] if on_cpu else ["float32", "bfloat16"]),
        batch_size=options.batch_size or (4 if on_cpu else 32),
        rounds=options.rounds,
        backend=None if options.compiled is False else "inductor",
    )


def _generators(_: list[str], options: _Options) -> dict[str, Any]:
    from vqhit.bench_generators import bench_generators

    return bench_generators(device=options.device, batch_size=options.batch_size or 4, rounds=options.rounds)


def _show_tokenizer(results: dict[str, Any], protocol: dict[str, Any], out: Path) -> None:
    from vqhit.plots import speed_bars
    from vqhit.tables import print_table, speed_row

    title = f"{protocol['model']}; {protocol['device']}, batch {protocol['batch_size']}, {protocol['rounds']} rounds"
    print_table(title, [speed_row(subject, row) for subject, rows in results.items() for row in rows])
    panels = {
        f"{subject}, {precision}": [row for row in rows if row["precision"] == precision]
        for subject, rows in results.items()
        for precision in protocol["precisions"]
    }
    speed_bars(panels, _picture(out), title)
    print(f"{_picture(out)}: images/s, as bars")


def _show_generators(results: dict[str, Any], protocol: dict[str, Any], _: Path) -> None:
    from vqhit.tables import bench_row, print_table

    measured = f"batch {protocol['batch_size']}, eager float32, {protocol['rounds']} rounds in turns"
    print_table(f"{protocol['device']}, {measured}", [bench_row(row) for row in results["generators"]])


def _picture(out: Path) -> Path:
    return out.with_suffix(".png")


class _Bench(NamedTuple):
    name: str
    run: Callable[[list[str], _Options], dict[str, Any]]
    """Times subjects; returns a dict for JSON: each of them, and `protocol`."""
    show: Callable[[dict[str, Any], dict[str, Any], Path], None]
    """Gets the subjects' results, the protocol and the JSON file's name."""


_TOKENIZER = _Bench("tokenizer", _tokenizer, _show_tokenizer)
_BENCHES = {
    "decode": _TOKENIZER,
    "encode": _TOKENIZER,
    "reconstruct": _TOKENIZER,
    "generators": _Bench("generators", _generators, _show_generators),
}
"""What times each subject."""


def bench(
    what: Annotated[str, typer.Argument(help=f"{', '.join(_BENCHES)} or all.")],
    out: Annotated[
        Path, typer.Option("--out", help="JSON file to write; a tokenizer's picture is beside it, .png.")
    ] = Path("bench.json"),
    preset: Annotated[
        str | None, typer.Option("--preset", help="Of a tokenizer with random weights; vqhit-b-256 if not set.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A tokenizer instead: folder, OWNER/NAME of the Hub, vqhit-tiny-64.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="float32 or bfloat16; may be repeated. On the CPU float32, else both."),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Also what torch.compile makes of them, by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="4; of a tokenizer on a GPU 32.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each model is timed.")] = 5,
    device: Device = "auto",
) -> None:
    """Time models side by side, in one process, in turns.

    decode, encode and reconstruct: a tokenizer beside taming-transformers' VQGAN. generators: those of the paper's
    Tables 4, 5 and 6 with random weights, eager in float32, its numbers beside ours.

    Example: vqhit bench decode --preset vqhit-s-256 --out decode.json
    """
    from vqhit.files import check_writable, write_atomic
    from vqhit.hub import select_device

    if what != "all" and what not in _BENCHES:
        raise ValueError(f"found {what!r}; allowed: {', '.join(_BENCHES)}, all")
    given = {"--preset": preset, "--model": model, "--precision": precision or None, "--compile": compiled}
    named = [option for option, value in given.items() if value is not None]
    subjects = list(_BENCHES) if what == "all" else [what]
    benches = list(dict.fromkeys(_BENCHES[subject] for subject in subjects))
    if _TOKENIZER not in benches and named:
        raise ValueError(f"{named[0]} is of a tokenizer; leave it out for {what}")
    check_writable(out)
    if _TOKENIZER in benches:
        if _picture(out) == out:
            raise ValueError(f"{out}: the name of the picture beside it; give --out another ending, such as .json")
        check_writable(_picture(out))
    options = _Options(select_device(device), batch_size, rounds, preset, model, precision or [], compiled)
    results, protocols = {}, {}
    for each in benches:
        found = each.run([subject for subject in subjects if _BENCHES[subject] is each], options)
        protocols[each.name] = found.pop("protocol")
        results[each.name] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    protocol = protocols if what == "all" else protocols[benches[0].name]
    written = {subject: rows for found in results.values() for subject, rows in found.items()}
    write_atomic(out, (json.dumps(written | {"protocol": protocol}, indent=2) + "\n").encode())
    for each in benches:
        each.show(results[each.name], protocols[each.name], out)
    print(f"{out}: the same, with the protocol")
