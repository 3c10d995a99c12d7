"""A checkpoint is complete and verified, or it is none."""

import json

import pytest

from vqhit import checkpoint
from vqhit.checkpoint import CheckpointError


def write(root, step, content=b"weights"):
    with checkpoint.writing(root, step) as folder:
        (folder / "model.bin").write_bytes(content)
        (folder / "state.json").write_text(json.dumps({"step": step}))


def test_the_newest_checkpoint_is_found_by_number(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 2):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step_000000010"
    checkpoint.verify(checkpoint.newest(tmp_path))


def test_an_error_while_writing_leaves_nothing(tmp_path):
    write(tmp_path, 1)

    def fail_half_way():
        with checkpoint.writing(tmp_path, 2) as folder:
            (folder / "model.bin").write_bytes(b"half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"]


def test_left_overs_of_a_killed_process_are_removed_by_the_next_save(tmp_path):
    (tmp_path / ".tmp-99-5").mkdir()
    (tmp_path / ".tmp-99-5" / "model.bin").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) is None
    write(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000006"]


@pytest.mark.parametrize("name", ["model.bin", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, name, fault):
    write(tmp_path, 1)
    write(tmp_path, 2)
    file = tmp_path / "step_000000002" / name
    content = bytearray(file.read_bytes())
    if fault == "delete":
        file.unlink()
    elif fault == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(file.parent)
    with pytest.warns(UserWarning, match=name):
        assert checkpoint.newest(tmp_path).name == "step_000000001"
    write(tmp_path, 2)
    checkpoint.verify(file.parent)


def test_if_all_are_damaged_nothing_starts_over_silently(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step_000000001" / "model.bin").unlink()
    with (
        pytest.warns(UserWarning, match=r"model\.bin"),
        pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"),
    ):
        checkpoint.newest(tmp_path)


def test_a_manifest_with_a_damaged_key_is_passed_over(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    manifest = tmp_path / "step_000000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("bytes", "byteS"))
    with pytest.warns(UserWarning, match=r"manifest\.json: damaged"):
        assert checkpoint.newest(tmp_path).name == "step_000000001"


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, 5, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000004", "step_000000005"]


def test_the_checkpoint_just_written_outlives_later_damaged_ones(tmp_path):
    for step in (4, 8):
        write(tmp_path, step)
    write(tmp_path, 5)  # the run was continued from 4 because 8 is damaged
    checkpoint.prune(tmp_path, 5, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000005"]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    for step in range(1, 9):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, step, keep=2, keep_every=3)
    assert [int(path.name[-2:]) for path in sorted(tmp_path.iterdir())] == [3, 6, 7, 8]


def test_the_manifest_says_what_wrote_it(tmp_path):
    with checkpoint.writing(tmp_path, 1, {"vqhit": "0.1"}) as folder:
        (folder / "model.bin").write_bytes(b"weights")
    manifest = json.loads((tmp_path / "step_000000001" / "manifest.json").read_text())
    assert (manifest["step"], manifest["vqhit"], list(manifest["files"])) == (1, "0.1", ["model.bin"])


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    for name in ("step_best", "step_000000004_mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_notes.txt").write_text("mine")
    for step in (3, 4, 5):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, step, keep=1, keep_every=3)
    names = {"step_best", "step_000000004_mine", "step_notes.txt", "step_000000003", "step_000000005"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert checkpoint.newest(tmp_path).name == "step_000000005"
