"""Time the loading of training images: python docs/time_data.py FOLDER [--size 256] [--workers 0].

Images/s of (a) decoding the encoded images of the prepared folder with PIL alone, (b) training batches from the
prepared folder, (c) training batches from FOLDER as it is, (d) decoding the files of FOLDER with PIL alone: the four
take turns in one process, over the same photographs; medians over rounds. And the seconds to list a folder of 100,000
files, beside those to read the list that was kept.
"""

import argparse
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

from PIL import Image

from vqhit.data import DataConfig, TrainingCrops, training_batches
from vqhit.folder import FolderSource
from vqhit.prepare import PrepareConfig, prepare
from vqhit.sources import open_source

BATCH = 32


def seconds(part):
    """Seconds that a call takes."""
    start = time.perf_counter()
    part()
    return time.perf_counter() - start


def decode(files):
    """Decode encoded images with PIL and nothing else."""
    for data in files:
        with Image.open(BytesIO(data)) as image:
            image.convert("RGB").load()


def loading_rates(folder, size, workers, rounds):
    """Images/s of the four parts, medians."""
    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared"
        prepare(PrepareConfig(path=str(folder), size=size), prepared)
        paths = {"b": str(prepared), "c": str(folder)}
        sources = {part: open_source(DataConfig(path=path)) for part, path in paths.items()}
        crops = {part: TrainingCrops(sources[part], DataConfig(path=paths[part]), size, seed=0) for part in paths}
        files = {part: [source.encoded(index).data for index in range(len(source))] for part, source in sources.items()}
        steps = len(sources["b"]) // BATCH

        def train(part):
            for _ in training_batches(crops[part], BATCH, 0, steps, workers):
                pass

        parts = {
            "a": (lambda: decode(files["b"]), len(files["b"])),
            "b": (lambda: train("b"), steps * BATCH),
            "c": (lambda: train("c"), steps * BATCH),
            "d": (lambda: decode(files["c"]), len(files["c"])),
        }
        rates = {part: [] for part in parts}
        for turn in range(rounds + 1):
            for part, (work, images) in parts.items():
                rate = images / seconds(work)
                if turn:  # the first warms up
                    rates[part].append(rate)
        return {part: statistics.median(values) for part, values in rates.items()}


def listing_seconds(files=100_000, folders=1000):
    """Seconds to list a folder anew, and to read its list."""
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(folders):
            folder = Path(temporary) / f"n{number:08d}"
            folder.mkdir()
            for name in range(files // folders):
                (folder / f"n{number:08d}_{name}.jpg").touch()
        scanned = []
        scan = seconds(lambda: scanned.append(FolderSource.scan(temporary)))
        kept = Path(temporary) / "kept"
        kept.write_bytes(scanned[0].index)
        return scan, seconds(lambda: FolderSource(temporary, kept.read_bytes()))


def main():
    """Print the rates, their ratios, and the seconds of listing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rates = loading_rates(arguments.folder, arguments.size, arguments.workers, arguments.rounds)
    print(f"a, PIL alone, prepared: {rates['a']:.0f} images/s")
    print(f"b, training batches, prepared: {rates['b']:.0f} images/s; b/a {rates['b'] / rates['a']:.2f}")
    print(f"c, training batches, unprepared: {rates['c']:.0f} images/s; b/c {rates['b'] / rates['c']:.2f}")
    print(f"d, PIL alone, unprepared: {rates['d']:.0f} images/s; c/d {rates['c'] / rates['d']:.2f}")
    scan, kept = listing_seconds()
    print(f"100,000 files: listed in {scan:.2f} s, the kept list read in {kept:.3f} s")


if __name__ == "__main__":
    main()
