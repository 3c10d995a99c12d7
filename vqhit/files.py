"""Files that are whole: written atomically, one process at a time, checked by hash, fetched into a cache."""

import fcntl
import hashlib
import http.client
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_HASH_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8}|[0-9a-f]{64})\.\w+$")  # all digits: perhaps a date
_TIMEOUT_S = 30.0  # without an answer


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place; a link's target is written.

    Raises `ValueError` for a path that is taken by anything but a file, `OSError` if it cannot be written.
    """
    path = _free(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Raise `ValueError`, before long work, if a file cannot be written there; makes nothing."""
    _check_above(path, _free(path).parent)


def _check_above(path: Path, above: Path) -> None:
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{path}: cannot be written, {above} {'cannot be written to' if above.is_dir() else 'is a file'}"
        )


def _free(path: Path) -> Path:
    """Where a file is to be written; raises `ValueError` for a place that is taken by anything but a file."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected the name of a file to write")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no regular file; expected the name of a file to write")
    return path


def read_json(path: Path) -> Any:
    """Content of a JSON file; raises `ValueError` saying what is wrong with it, NaN and infinity included.

    A file that is not there raises `FileNotFoundError` or `NotADirectoryError`.
    """

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"holds {number[:20]}, which is no finite number")
        return value

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=finite, parse_float=finite)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"not a readable JSON file: {error}") from None


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class InUseError(ValueError):
    """Another process has the lock; the text is its name."""


def lock(path: Path) -> IO[str]:
    """Claim a lock file until it is closed or this process ends, however it ends; raises `InUseError`.

    A lock between processes: loader processes that outlive a kill do not hold it, and two claims in one process are
    not kept apart. Where the file system has no locks, a warning says so.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InUseError(holder) from None
    except OSError as error:
        warnings.warn(
            f"{path.parent}: its file system has no locks ({error}); let no second process write there", stacklevel=2
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def check_apart(source: str, target: Path) -> None:
    """Raise `ValueError` if a folder to write is, holds or lies in the one that is read, if `source` is one."""
    here, there = Path(source).resolve(), target.resolve()
    if Path(source).exists() and (here == there or there in here.parents or here in there.parents):
        raise ValueError(f"{target}: the folder to write cannot be, hold or lie in the one that is read, {source}")


def check_new_folder(folder: Path) -> None:
    """Raise `ValueError` if a folder to write is there and not empty, is a file, or cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: {'not empty' if folder.is_dir() else 'a file'}; give a new or empty folder")
    _check_above(folder, Path(os.path.realpath(folder)))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name, whose files are in `target`, new or empty, then; nowhere after an error.

    Nor after SIGTERM; a process that is killed may leave the temporary folder: beside a new one, or in one that was
    there. Raises `ValueError` if another process has written there meanwhile.
    """
    target = Path(os.path.realpath(target))
    there = target.exists()
    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    placed: list[Path] = []
    with _terminated_by_exception():
        folder = Path(tempfile.mkdtemp(dir=target if there else target.parent, prefix=f".{target.name}."))
        try:
            yield folder
            files = sorted(folder.iterdir())
            for file in files:
                file.chmod(0o644)
                flush(file)
            if set(target.iterdir() if target.exists() else []) - {folder}:
                raise ValueError(f"{target}: another process has written there meanwhile")
            if there:  # it may be a mount point, or where a shell is: it stays itself
                for file in files:
                    placed.append(file.rename(target / file.name))
                folder.rmdir()
            else:
                folder.chmod(0o755)
                folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for path in placed:
                path.unlink(missing_ok=True)
            for path in made:
                with suppress(OSError):  # another process may use it by now
                    path.rmdir()
            raise


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM end the process by `SystemExit`, so that what it leaves is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def sha256(path: Path) -> str:
    """Return the hash of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class KnownFile:
    """A file of published weights: its name, where it comes from, and the hash that it must have."""

    name: str
    url: str
    sha256: str
    """Hexadecimal; the first digits where no more are published."""

    def cached(self) -> Path:
        """Where it is kept: `torch.hub.get_dir()`/checkpoints (`TORCH_HOME` moves it)."""
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def find(self, path: Path | str | None = None, key: str = "path") -> Path:
        """Return `path`, or the file in torchvision's cache, downloaded if need be, once its hash is checked.

        Raises `ValueError` that says which file to put where, or to name under `key`, if there is none or another.
        """
        import torch

        before = socket.getdefaulttimeout()
        if path is not None:
            path = Path(path).expanduser()
            check_hash(path, self.sha256)
            return path
        cached = self.cached()
        if not cached.exists():
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                socket.setdefaulttimeout(_TIMEOUT_S)
                torch.hub.download_url_to_file(self.url, str(cached), hash_prefix=self.sha256)
            except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                # no network, no space, no such file, another hash, an answer that is no HTTP
                raise ValueError(
                    f"cannot download {self.url} ({' '.join(str(error).split())}); put that file at {cached}, or its "
                    f"place in {key} (sha256 {self.sha256}{'' if len(self.sha256) == 64 else '...'})"
                ) from None
            finally:
                socket.setdefaulttimeout(before)
        try:
            check_hash(cached, self.sha256)
        except ValueError as error:
            raise ValueError(f"{error}; remove it to download it again, or put the right file there") from None
        return cached

    def read(self, path: Path | str | None = None, key: str = "path") -> bytes:
        """Content of the file that `find` returns; the bytes themselves are hashed, whatever happens to the file."""
        found = self.find(path, key)
        data = found.read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(self.sha256):
            raise ValueError(f"{found}: changed while it was read")
        return data


def check_hash(path: Path, expected: str | None = None) -> None:
    """Compare a file's sha256 with `expected`, or with the first digits that torchvision's file names carry, if any.

    Raises `ValueError` if there is no such file or its hash differs.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    origin = ""
    if expected is None:
        in_name = _HASH_IN_NAME.search(path.name)
        expected, origin = in_name[1] if in_name else "", ", as in its name"
    if expected and not (found := sha256(path)).startswith(expected):
        raise ValueError(f"{path}: another file, or damaged: its sha256 is {found}, expected {expected}{origin}")
