"""Training checkpoints: a directory that is complete and verified, or not a checkpoint at all.

A checkpoint is written under a temporary name, its files are flushed, a manifest (sizes and sha256) comes last, and the
directory is renamed into place. One that does not match its manifest is passed over.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqhit.files import flush, read_json, sha256

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged; the message names the file and what is wrong with it."""


@contextmanager
def writing(root: Path, step: int, about: dict[str, Any] | None = None) -> Iterator[Path]:
    """Give a temporary directory to fill; make it the checkpoint of `step` when the block ends without an error.

    `about` goes into the manifest as it is: the configuration, versions.
    """
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".tmp-*"):
        shutil.rmtree(left_over)
    temporary, final = root / f".tmp-{os.getpid()}-{step}", root / _name(step)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(path for path in temporary.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
        content = {"step": step, "files": manifest, **(about or {})}
        (temporary / MANIFEST).write_text(json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n")
        for path in [*files, temporary / MANIFEST, temporary]:
            flush(path)
        if final.exists():  # a damaged one that was passed over on resuming
            _discard(final)
        temporary.rename(final)
        flush(root)
    except OSError as error:
        raise OSError(f"{final}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def newest(root: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there are none.

    Warns of each damaged one that it passes over; raises `CheckpointError` if all of them are damaged.
    """
    damage = None
    for path in reversed(_all(root)):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; looking for a checkpoint before it", stacklevel=2)
            damage = error
        else:
            return path
    if damage is not None:
        raise CheckpointError(f"{damage}; no checkpoint in {root} is whole: remove the folder to start again")
    return None


def verify(path: Path) -> None:
    """Compare every file with the manifest; raises `CheckpointError` naming the first that differs."""
    try:
        content = read_json(path / MANIFEST)
        digest = content.pop("sha256")
        expected = [(path / name, entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}, so not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST}: damaged") from None
    if _digest(content) != digest:
        raise CheckpointError(f"{path / MANIFEST}: damaged, its sha256 is not the one in it")
    for file, bytes_written, expected_sha256 in expected:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if (size := file.stat().st_size) != bytes_written:
            raise CheckpointError(f"{file}: damaged, {size} bytes where the manifest says {bytes_written}")
        if sha256(file) != expected_sha256:
            raise CheckpointError(f"{file}: damaged, its sha256 is not the manifest's")


def step_of(path: Path) -> int:
    """Return the step of a checkpoint that verifies."""
    return int(json.loads((path / MANIFEST).read_text())["step"])


def prune(root: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Keep the checkpoint of `step` and the newest before it, `keep` in all, and those of each `keep_every` steps.

    Later ones go too: the run was continued from before them because they were damaged.
    """
    up_to_now = [path for path in _all(root) if path.name <= _name(step)]
    kept = set(up_to_now[-keep:])
    if keep_every:
        kept |= {path for path in up_to_now if int(path.name.removeprefix("step_")) % keep_every == 0}
    for path in set(_all(root)) - kept:
        _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint: at once no checkpoint any more, whatever a kill leaves of it."""
    gone = path.with_name(f".tmp-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)


def _all(root: Path) -> list[Path]:
    """All checkpoints, the oldest first; a copy under a longer name is none."""
    return sorted(path for path in root.glob("step_*") if re.fullmatch(r"step_\d{9}", path.name) and path.is_dir())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _name(step: int) -> str:
    return f"step_{step:09d}"
