"""Data sets of the Hub, with its own client, from a server that answers as the Hub does."""

import json
import os
import subprocess
import sys
from io import BytesIO

import datasets
import pytest
from PIL import Image

from tests.fake_hub import COMMIT, hub

READ = """
import json, sys
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
from vqhit.folder import DataError
from vqhit.sources import SourceConfig, open_source, open_stream

results = []
for path, values in json.loads(sys.argv[1]):
    config = SourceConfig(path=path, **values)
    for opened in (open_source, open_stream):
        try:
            source = opened(config)
            if opened is open_source:
                pictures = [source.read(number) for number in range(len(source))]
            else:
                pictures = [image for image, _ in source.read(0, 10)]
            results.append(sorted(image.getpixel((0, 0))[0] for image in pictures))
        except DataError as error:
            results.append(str(error))
print(json.dumps(results))
"""


def read(tmp_path, *wanted, **environment):
    """What a fresh process reads: of each data set the grey levels, or the error, by number and as a stream."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), **environment}
    command = [sys.executable, "-c", READ, json.dumps(wanted)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def grey(level):
    file = BytesIO()
    Image.new("RGB", (10, 10), (level,) * 3).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """A data set of 8 images in two Parquet files."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for shard in range(2):
        cells = [{"bytes": grey(4 * shard + number), "path": None} for number in range(4)]
        rows = datasets.Dataset.from_dict({"image": cells, "label": [0] * 4}, features=features)
        rows.to_parquet(folder / "data" / f"train-{shard:05d}-of-00002.parquet")
    return folder


def test_a_data_set_of_the_hub_is_read_by_number_and_as_a_stream(tmp_path, parquet):
    with hub(parquet) as (address, asked):
        found = read(tmp_path, ("someone/photos", {}), ("someone/photos", {"revision": COMMIT}), HF_ENDPOINT=address)
    assert found == [list(range(8))] * 4
    assert f"/datasets/someone/photos/resolve/{COMMIT}/data/train-00001-of-00002.parquet" in asked


def test_a_folder_of_image_files_on_the_hub_is_too(tmp_path):
    (tmp_path / "hub" / "train").mkdir(parents=True)
    for level in range(6):
        (tmp_path / "hub" / "train" / f"{level}.png").write_bytes(grey(level))
    with hub(tmp_path / "hub") as (address, _):
        assert read(tmp_path, ("someone/photos", {}), HF_ENDPOINT=address) == [list(range(6))] * 2


def test_what_the_hub_does_not_give_is_one_line_that_names_it(tmp_path, parquet):
    wanted = [
        ("someone/absent", {}),
        ("someone/private", {}),
        ("someone/photos", {"revision": "absent"}),
        ("someone/photos", {"split": "absent"}),
    ]
    with hub(parquet) as (address, _):
        errors = read(tmp_path, *wanted, HF_ENDPOINT=address)
    for (path, _), *both in zip(wanted, errors[::2], errors[1::2], strict=True):
        for error in both:
            assert error.startswith(f"{path}: no such folder, and no data set that the Hub gives (")
            assert "\n" not in error
    for part, error in zip(("doesn't exist", "401", "Revision 'absent'", "['train']"), errors[::2], strict=True):
        assert part in error


def test_without_a_network_an_id_is_one_line(tmp_path):
    errors = read(tmp_path, ("someone/photos", {}), HF_HUB_OFFLINE="1")
    for error in errors:
        assert error.startswith("someone/photos: no such folder, and no data set that the Hub gives (")
        assert "\n" not in error
