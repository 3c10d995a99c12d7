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


_Panels = dict[str, list[dict[str, Any]]]
"""Names and rows of `speed_bars`."""
_PRESET = "vqhit-b-256"


def _tokenizer(subjects: list[str], options: _Options) -> dict[str, Any]:
    from vqhit.bench_tokenizer import bench_tokenizer, random_tokenizer
    from vqhit.models import VQHiT

    if options.model is not None and options.preset is not None:
        raise ValueError(f"--model {options.model} and --preset {options.preset}: give one of them")
    if options.model is None:
        preset = options.preset or _PRESET
        name, model = f"{preset}, random weights", random_tokenizer(preset, options.device)
    else:
        name, model = options.model, VQHiT.from_pretrained(options.model, device=options.device)
    return bench_tokenizer(
        model,
        subjects,
        name=name,
        precisions=options.precisions,
        batch_size=options.batch_size or (4 if options.device.type == "cpu" else 32),
        rounds=options.rounds,
        backend=None if options.compiled is False else "inductor",
    )


def _train(_: list[str], options: _Options) -> dict[str, Any]:
    from vqhit.bench_train import bench_train

    return bench_train(
        device=options.device,
        preset=options.preset or _PRESET,
        precisions=options.precisions,
        batch_size=options.batch_size or (2 if options.device.type == "cpu" else 16),
        rounds=options.rounds,
    )


def _generators(_: list[str], options: _Options) -> dict[str, Any]:
    from vqhit.bench_generators import bench_generators

    return bench_generators(device=options.device, batch_size=options.batch_size or 4, rounds=options.rounds)


def _show_tokenizer(results: dict[str, Any], protocol: dict[str, Any]) -> _Panels:
    from vqhit.tables import print_table, speed_row

    print_table(_title(protocol), [speed_row(subject, row) for subject, rows in results.items() for row in rows])
    return {
        f"{subject}, {precision}": [row for row in rows if row["precision"] == precision]
        for subject, rows in results.items()
        for precision in protocol["precisions"]
    }


def _show_train(results: dict[str, Any], protocol: dict[str, Any]) -> _Panels:
    from vqhit.tables import part_row, print_table, training_row

    train = results["train"]
    subjects = {"autoencoder": train["autoencoder"]}
    for row in train["steps"]:
        every = "every step" if row["r1_every"] == 1 else f"every {row['r1_every']}"
        subjects.setdefault(f"step, R1 {every}", []).append(row)
    rows = [training_row(subject, row) for subject, found in subjects.items() for row in found]
    print_table(f"training, {_title(protocol)}", rows)
    print_table("parts of vqhit's step with R1, each alone", [part_row(row) for row in train["parts"]])
    return {
        f"training: {subject}, {precision}": [row for row in found if row["precision"] == precision]
        for subject, found in subjects.items()
        for precision in protocol["precisions"]
    }


def _show_generators(results: dict[str, Any], protocol: dict[str, Any]) -> _Panels:
    from vqhit.tables import bench_row, print_table

    measured = f"batch {protocol['batch_size']}, eager float32, {protocol['rounds']} rounds in turns"
    print_table(f"{protocol['device']}, {measured}", [bench_row(row) for row in results["generators"]])
    return {}


def _title(protocol: dict[str, Any]) -> str:
    measured = f"batch {protocol['batch_size']}, {protocol['rounds']} rounds"
    return f"{protocol['model']}; {protocol['device']}, {measured}"


class _Bench(NamedTuple):
    name: str
    run: Callable[[list[str], _Options], dict[str, Any]]
    """Times subjects; returns a dict for JSON: each of them, and `protocol`."""
    show: Callable[[dict[str, Any], dict[str, Any]], _Panels]
    """Prints the subjects' results, given their protocol; returns what is drawn of them."""
    options: tuple[str, ...]
    """Those that not every bench has."""
    drawn: bool = True


_TOKENIZER = _Bench(
    "tokenizer", _tokenizer, _show_tokenizer, ("--preset", "--model", "--precision", "--compile/--no-compile")
)
_BENCHES = {
    "decode": _TOKENIZER,
    "encode": _TOKENIZER,
    "reconstruct": _TOKENIZER,
    "train": _Bench("train", _train, _show_train, ("--preset", "--precision")),
    "generators": _Bench("generators", _generators, _show_generators, (), drawn=False),
}
"""What times each subject."""


def bench(
    what: Annotated[str, typer.Argument(help=f"{', '.join(_BENCHES)} or all.")],
    out: Annotated[
        Path, typer.Option("--out", help="JSON file to write; but for generators, a picture is beside it, .png.")
    ] = Path("bench.json"),
    preset: Annotated[
        str | None, typer.Option("--preset", help=f"A tokenizer with random weights; {_PRESET} if not set.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Another, but for train: folder, OWNER/NAME of the Hub, vqhit-tiny-64."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="float32 or bfloat16; may be repeated. On the CPU float32, else both."),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Also what torch.compile makes of them, by default.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="4, train 2; on a GPU 32, train 16, generators 4.", show_default=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each model is timed.")] = 5,
    device: Device = "auto",
) -> None:
    """Time models side by side, in one process, in turns.

    decode, encode and reconstruct: a tokenizer beside taming-transformers' VQGAN. train: its training steps, with and
    without activation checkpointing, beside VQGAN's, eager. generators: those of the paper's Tables 4, 5 and 6 with
    random weights, eager in float32, its numbers beside ours.

    Example: vqhit bench decode --preset vqhit-s-256 --out decode.json
    """
    from vqhit.bench import PRECISIONS, check_known
    from vqhit.files import check_writable, write_atomic
    from vqhit.hub import select_device

    if what != "all" and what not in _BENCHES:
        raise ValueError(f"found {what!r}; allowed: {', '.join(_BENCHES)}, all")
    subjects = list(_BENCHES) if what == "all" else [what]
    benches = list(dict.fromkeys(_BENCHES[subject] for subject in subjects))
    given = {"--preset": preset, "--model": model, "--precision": precision or None, "--compile/--no-compile": compiled}
    for option, value in given.items():
        if value is not None and not any(option in each.options for each in benches):
            takers = ", ".join(subject for subject, each in _BENCHES.items() if option in each.options)
            raise ValueError(f"{option} is of {takers}; leave it out for {what}")
    check_known("--precision", precision or [], PRECISIONS)
    check_writable(out)
    picture = out.with_suffix(".png")
    if any(each.drawn for each in benches):
        if picture == out:
            raise ValueError(f"{out}: the name of the picture beside it; give --out another ending, such as .json")
        check_writable(picture)
    where = select_device(device)
    precisions = precision or (["float32"] if where.type == "cpu" else ["float32", "bfloat16"])
    options = _Options(where, batch_size, rounds, preset, model, precisions, compiled)
    results, protocols = {}, {}
    for each in benches:
        found = each.run([subject for subject in subjects if _BENCHES[subject] is each], options)
        protocols[each.name] = found.pop("protocol")
        results[each.name] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    protocol = protocols if what == "all" else protocols[benches[0].name]
    written = {subject: rows for found in results.values() for subject, rows in found.items()}
    write_atomic(out, (json.dumps(written | {"protocol": protocol}, indent=2) + "\n").encode())
    panels: _Panels = {}
    for each in benches:
        panels |= each.show(results[each.name], protocols[each.name])
    if panels:
        from vqhit.plots import speed_bars

        titles = dict.fromkeys(_title(protocols[each.name]) for each in benches if each.drawn)
        speed_bars(panels, picture, "\n".join(titles))
        print(f"{picture}: images/s, as bars")
    print(f"{out}: the same, with the protocol")
