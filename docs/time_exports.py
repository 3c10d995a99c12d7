"""Exported files beside eager mode: python docs/time_exports.py MODEL [BATCH]...

MODEL is a tokenizer's name, or a preset (vqhit-b-256), whose weights are then random. Prints the size of
each file, how far it is from eager mode, and milliseconds of an image on the CPU, by batch size (1 and 8 if none are
given): all in one process, in turns, with the same number of threads; medians.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch

from vqhit import VQHiT, VQHiTConfig
from vqhit.bench import time_in_turns
from vqhit.export import PARTS, SUFFIXES, export, load_runner, sample_inputs
from vqhit.norms import reestimate_batch_norm
from vqhit.tables import print_table

ROUNDS = 5
CPU = torch.device("cpu")


def load(name):
    """A trained tokenizer, or a preset with random weights and batch norm's statistics of them."""
    if not name.startswith("vqhit-") or not name.endswith("-256"):
        return VQHiT.from_pretrained(name)
    torch.manual_seed(0)
    model = VQHiT(VQHiTConfig.preset(name))
    reestimate_batch_norm(model, [sample_inputs(model, "encoder", 2)])
    return model.eval()


def main(name, batches):
    """Print one table."""
    model, rows = load(name), []
    with tempfile.TemporaryDirectory() as folder:
        reports = {format: export(model, Path(folder) / format, format=format) for format in SUFFIXES}
        for part in PARTS:
            eager = model.encode if part == "encoder" else model.decode
            files = {format: Path(folder) / format / f"{part}{suffix}" for format, suffix in SUFFIXES.items()}
            ways = {"eager": eager, **{format: load_runner(file) for format, file in files.items()}}
            milliseconds = {}
            for count in batches:
                inputs = sample_inputs(model, part, count)
                parts = {way: lambda run=run, inputs=inputs: run(inputs) for way, run in ways.items()}
                for way, times in time_in_turns(parts, ROUNDS, CPU).items():
                    milliseconds[way, count] = 1000 * statistics.median(times) / count
            for way in ways:
                row = {"part": part, "run by": way, "MB": "-", "differs": "-"}
                if way != "eager":
                    made = reports[way]["parts"][part]
                    row["MB"] = f"{sum(made['files'].values()) / 1e6:.2f}"
                    check = made["check"]
                    row["differs"] = (
                        f"{check['tokens_differing']}/{check['tokens']}"
                        if part == "encoder"
                        else f"{check['largest_difference']:.1e}"
                    )
                for count in batches:
                    own, base = milliseconds[way, count], milliseconds["eager", count]
                    row[f"ms, batch {count}"] = f"{own:.2f} ({own / base:.2f})"
                rows.append(row)
    print_table(f"{name}, {torch.get_num_threads()} threads; ms of an image (ratio to eager)", rows)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python docs/time_exports.py MODEL [BATCH]...")
    main(sys.argv[1], [int(batch) for batch in sys.argv[2:]] or [1, 8])
