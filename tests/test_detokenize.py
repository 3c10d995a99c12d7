"""Tokens back to pictures: pixel for pixel what the model decodes, or one line that says why not."""

import json
import shutil

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from vqhit import VQHiT
from vqhit.detokenize import detokenize
from vqhit.folder import DataError
from vqhit.images import to_uint8, uint8_to_pil
from vqhit.tokenize import TokenizeConfig, load_identified, tokenize


@pytest.fixture
def tokens(tiny_model, photo_folder, tmp_path):
    """Tokens of six photographs in two shards, and their tokenizer beside them."""
    tiny_model.save_pretrained(tmp_path / "model")
    config = TokenizeConfig(path=str(photo_folder), images_per_shard=4)
    tokenize(
        tiny_model, config, tmp_path / "tokens", identity=load_identified(str(tmp_path / "model"), device="cpu")[1]
    )
    return tmp_path / "tokens"


def rewrite(folder, column, change, shard=0):
    """Write a shard again with another column, its metadata as they were."""
    path = sorted((folder / "data").iterdir())[shard]
    table = parquet.read_table(path)
    position = table.schema.get_field_index(column)
    table = table.set_column(position, column, change(table[column]))
    parquet.write_table(table, path)


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_pictures_are_what_the_model_decodes_in_the_order_of_the_rows(tiny_model, tokens, photo_folder, tmp_path):
    assert detokenize(tokens, tmp_path / "out") == 6
    found = pictures(tmp_path / "out")
    assert list(found) == [f"{number:06d}.png" for number in range(6)]
    photos = sorted(path for path in photo_folder.rglob("*") if path.is_file())
    for photo, picture in zip(photos, found.values(), strict=True):
        expected = to_uint8(tiny_model.decode(tiny_model.encode(tiny_model.preprocess(photo))))[0]
        np.testing.assert_array_equal(picture, np.asarray(uint8_to_pil(expected)))


def test_a_limit_decodes_the_first_rows(tokens, tmp_path):
    detokenize(tokens, tmp_path / "all")
    assert detokenize(tokens, tmp_path / "five", limit=5, batch_size=4) == 5
    whole, some = pictures(tmp_path / "all"), pictures(tmp_path / "five")
    assert list(some) == list(whole)[:5]
    for name, picture in some.items():
        assert np.abs(picture.astype(int) - whole[name]).max() <= 1  # another batch, another rounding
    assert detokenize(tokens, tmp_path / "more", limit=100) == 6


def test_file_names_in_the_rows_lead_nowhere(tokens, tmp_path):
    rewrite(tokens, "source", lambda column: pyarrow.array(["../../evil.png"] * len(column)))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    detokenize(tokens, tmp_path / "out")
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in new} == {tmp_path / "out"}
    assert len(new) == 6


def test_other_weights_are_refused_unless_they_are_asked_for(tiny_model, tokens, tmp_path):
    torch.manual_seed(1)
    other = VQHiT(tiny_model.config).eval()
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: not the weights that made these tokens, sha256 \w{16}\.\.\. instead"):
        detokenize(tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="model: not the encoder and codebook that made these tokens"):
        detokenize(tokens, tmp_path / "out", model=str(tmp_path / "model"), limit=1)
    first = parquet.read_table(tokens / "data")["tokens"][0].as_py()
    expected = to_uint8(other.decode(torch.tensor([first])))[0]
    np.testing.assert_array_equal(pictures(tmp_path / "out")["000000.png"], np.asarray(uint8_to_pil(expected)))


def test_the_same_weights_elsewhere_are_taken_without_a_word(tokens, tmp_path, recwarn):
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"model: no such folder.*; --model says where the tokenizer is"):
        detokenize(tokens, tmp_path / "out")
    assert detokenize(tokens, tmp_path / "out", model=str(tmp_path / "moved")) == 6
    assert not recwarn.list


def test_another_decoder_for_the_same_tokens_is_taken_without_a_word(
    tiny_model, conv_config, tokens, tmp_path, recwarn
):
    other = VQHiT(conv_config).eval()
    for mine, theirs in zip(other.token_parts, tiny_model.token_parts, strict=True):
        mine.load_state_dict(theirs.state_dict())
    other.save_pretrained(tmp_path / "other")
    assert detokenize(tokens, tmp_path / "out", model=str(tmp_path / "other"), limit=1) == 1
    assert not recwarn.list
    with torch.no_grad():
        other.quantizer.codebook[3] *= 2
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="other: not the encoder and codebook that made these tokens"):
        detokenize(tokens, tmp_path / "again", model=str(tmp_path / "other"), limit=1)


def test_a_tokenizer_of_another_codebook_or_grid_is_refused(tokens, tmp_path):
    with pytest.raises(
        ValueError,
        match="vqhit-tiny-64: 1024 codes, 16x16 tokens an image; these tokens are 8x8 of 32 codes",
    ):
        detokenize(tokens, tmp_path / "out", model="vqhit-tiny-64")


def out_of_range(folder):
    def change(column):
        values = column.combine_chunks().flatten().to_numpy().copy()
        values[70] = 32
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), 64)

    rewrite(folder, "tokens", change)


def short_rows(folder):
    def change(column):
        return pyarrow.FixedSizeListArray.from_arrays(column.combine_chunks().flatten()[: 63 * len(column)], 63)

    rewrite(folder, "tokens", change, shard=1)


def no_tokens(folder):
    rewrite(folder, "tokens", lambda column: pyarrow.nulls(len(column), column.type))


def cut_off(folder):
    path = folder / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def swap(folder):
    first, second = sorted((folder / "data").iterdir())
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def change_metadata(folder, about):
    path = folder / "data" / "train-00001-of-00002.parquet"
    table = parquet.read_table(path)
    metadata = {**table.schema.metadata, b"vqhit": json.dumps(about).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def of_others(folder):
    change_metadata(folder, {"made": "otherwise", "skipped": []})


def strange(folder):
    change_metadata(folder, {"made": "x", "skipped": 5})


DAMAGES = {
    "a token that is no code": (out_of_range, r"00000-of-00002.parquet: tokens range from \d+ to 32; allowed: 0 to 31"),
    "another grid": (
        lambda folder: rewrite(folder, "height", lambda column: pyarrow.array([16] * len(column), pyarrow.uint16())),
        "height 16; manifest.json says 8",
    ),
    "rows that are too short": (short_rows, "00001-of-00002.parquet: 126 tokens in 2 rows; a row has 64"),
    "rows without tokens": (no_tokens, r"tokens in 4 rows; a row has 64"),
    "tokens that are no lists": (
        lambda folder: rewrite(folder, "tokens", lambda column: pyarrow.array(["x"] * len(column))),
        "00000-of-00002.parquet: tokens are string; expected lists of integers",
    ),
    "a truncated shard": (cut_off, r"00001-of-00002.parquet: damaged \("),
    "a missing shard": (
        lambda folder: (folder / "data" / "train-00000-of-00002.parquet").unlink(),
        r"00000-of-00002.parquet: damaged \(",
    ),
    "an incomplete folder": (lambda folder: edit(folder, complete=False), "tokens: not complete; the command that"),
    "too few rows": (lambda folder: edit(folder, rows=7), "tokens: 6 rows; manifest.json says 7"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "tokens: no manifest.json in it"),
    "a newer format": (lambda folder: edit(folder, format_version=2), "format_version: found 2; this vqhit reads 1"),
    "a strange manifest": (lambda folder: edit(folder, shards="many"), "shards: found 'many'; expected int"),
    "no shards": (lambda folder: edit(folder, shards=0, rows=0), "shards: found 0; expected 1 or more"),
    "no count of images": (lambda folder: edit(folder, images=None), "images: found None; expected int"),
    "swapped shards": (swap, "its rows are not in the order of their images; tokenize again"),
    "a shard of other tokens": (of_others, "00001-of-00002.parquet: no shard of these tokens"),
    "rows without numbers": (
        lambda folder: rewrite(folder, "index", lambda column: pyarrow.nulls(len(column), column.type)),
        "index: found int64 or nulls; expected integers",
    ),
    "a shard whose metadata are strange": (strange, "parquet: not written by vqhit tokenize"),
    "a manifest like a well": (
        lambda folder: (folder / "manifest.json").write_text("[" * 200_000),
        "not a readable JSON file",
    ),
    "a strange grid": (
        lambda folder: edit(folder, token_grid=[8, "8"]),
        r"token_grid: found \[8, '8'\]; expected height",
    ),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "not a readable JSON file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_named_before_anything_is_written(tokens, tmp_path, damage):
    do, message = DAMAGES[damage]
    do(tokens)
    with pytest.raises(DataError, match=message):
        detokenize(tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_new_or_empty_folder_apart_from_the_tokens_is_written(tokens, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").write_text("mine")
    with pytest.raises(ValueError, match="full: not empty; give a new or empty folder"):
        detokenize(tokens, tmp_path / "full")
    with pytest.raises(ValueError, match="cannot be, hold or lie in the one that is read"):
        detokenize(tokens, tokens / "pictures")
    assert (tmp_path / "full" / "000000.png").read_text() == "mine"


def test_the_command_writes_pictures_and_its_errors_are_one_line(inside, tokens, tmp_path):
    result = inside("detokenize", "tokens", "--out", "out", "--limit", 2, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "out: 2 pictures"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png"]
    shutil.rmtree(tokens / "data")
    broken = inside("detokenize", "tokens", "--out", "other", cwd=tmp_path)
    assert broken.returncode == 2
    assert broken.stderr.startswith("vqhit: tokens/data/train-00000-of-00002.parquet: damaged (")
    assert len(broken.stderr.splitlines()) == 1
