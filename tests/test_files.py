"""Files that are whole: atomic writing, hashes, and weights from a path, a cache or a download."""

import contextlib
import fcntl
import functools
import hashlib
import http.server
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch

from vqhit.files import (
    KnownFile,
    check_hash,
    check_new_folder,
    check_writable,
    lock,
    new_folder,
    sha256,
    write_atomic,
)

CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A local HTTP server of a folder: (folder, address, requests it got)."""
    folder, requests = tmp_path / "served", []
    folder.mkdir()

    class Handler(Quiet):
        def do_GET(self):
            requests.append(self.path)
            if self.path.endswith("chunks.pth"):  # stops in the middle of a chunk
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\nabc")
            elif self.path.endswith("garbage.pth"):
                self.wfile.write(b"what?\r\n\r\n")
            elif self.path.endswith("cut.pth"):  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", str(len(CONTENT)))
                self.end_headers()
                self.wfile.write(CONTENT[:100])
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}", requests
        httpd.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torchvision's cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_only_files_are_replaced_and_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("folder", "a folder; expected"), ("pipe", "no regular file; expected")):
        for attempt in (check_writable, lambda path: write_atomic(path, b"")):
            with pytest.raises(ValueError, match=message):
                attempt(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_whether_a_file_can_be_written_is_known_without_making_anything(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        check_writable(tmp_path / "file" / "below")


def known(address, name="net.pth", digest=HASH):
    return KnownFile(name, f"{address}/{name}", digest)


def test_a_file_is_downloaded_once_and_verified(server, cache):
    folder, address, requests = server
    (folder / "net.pth").write_bytes(CONTENT)
    for _ in range(2):
        path = known(address).find()
        assert path == cache / "net.pth"
        assert path.read_bytes() == CONTENT
    assert requests == ["/net.pth"]


def test_a_hash_may_be_its_first_digits(server, cache):
    folder, address, _ = server
    (folder / "net.pth").write_bytes(CONTENT)
    assert known(address, digest=HASH[:8]).find().read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["another file", "cut", "chunks", "garbage", "absent", "no server"])
def test_a_download_that_fails_says_which_file_to_put_where_and_leaves_nothing(server, cache, fault):
    folder, address, _ = server
    (folder / "net.pth").write_bytes(b"something else")
    name = "net.pth" if " " in fault else f"{fault}.pth"
    if fault == "no server":
        address = "http://127.0.0.1:9"
    with pytest.raises(ValueError, match="cannot download") as error:
        known(address, name).find()
    message = str(error.value)
    assert f"{address}/{name}" in message
    assert f"put that file at {cache / name}" in message
    assert HASH in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_a_cached_file_is_used_offline_but_not_if_it_is_another(cache):
    cache.mkdir(parents=True)
    (cache / "net.pth").write_bytes(CONTENT)
    offline = known("http://127.0.0.1:9")
    assert offline.find() == cache / "net.pth"
    (cache / "net.pth").write_bytes(CONTENT[:-1])
    message = rf"net\.pth: another file, or damaged: its sha256 is \w+, expected {HASH}; remove it to download it again"
    with pytest.raises(ValueError, match=message):
        offline.find()


def test_a_given_path_is_verified_and_nothing_is_downloaded(tmp_path):
    path = tmp_path / "mine.pth"
    with pytest.raises(ValueError, match="a folder, not a file"):
        known("http://127.0.0.1:9").find(tmp_path)
    with pytest.raises(ValueError, match=r"mine\.pth: no such file"):
        known("http://127.0.0.1:9").find(path)
    path.write_bytes(CONTENT)
    assert known("http://127.0.0.1:9").find(str(path)) == path
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"mine\.pth: another file, or damaged"):
        known("http://127.0.0.1:9").find(path)


def test_the_digits_in_a_name_of_torchvisions_are_checked(tmp_path):
    right, wrong, without, date = (
        tmp_path / f"net{end}.pth" for end in (f"-{HASH[:8]}", "-0000000a", "-features", "-20240131")
    )
    for path in (right, wrong, without, date):
        path.write_bytes(CONTENT)
    for path in (right, without, date):
        check_hash(path)
    with pytest.raises(ValueError, match="expected 0000000a, as in its name"):
        check_hash(wrong)


def test_atomic_writing_replaces_or_leaves(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    assert path.read_bytes() == b"one"
    with contextlib.suppress(TypeError):
        write_atomic(path, "not bytes")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
    assert sha256(path) == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_has_all_its_files_or_is_not_there(tmp_path, there):
    target = tmp_path / "above" / "new"
    if there:
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "half").write_bytes(CONTENT)
        assert not (target / "half").exists()
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == before
    number = target.stat().st_ino if there else None
    with new_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_bytes(CONTENT)
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert list(target.parent.iterdir()) == [target]
    assert (target / "a").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
    assert number in (None, target.stat().st_ino)  # a shell may be in it


def test_of_two_that_write_a_folder_the_later_is_refused_and_the_others_files_stay(tmp_path):
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "there", tmp_path / "new"):
        with contextlib.ExitStack() as late:
            (late.enter_context(new_folder(target)) / "a").write_bytes(b"late")
            target.mkdir(exist_ok=True)
            (target / "a").write_bytes(CONTENT)
            with pytest.raises(ValueError, match="another process has written there meanwhile"):
                late.close()
        assert [path.read_bytes() for path in target.iterdir()] == [CONTENT]


@pytest.mark.parametrize("there", [False, True])
def test_a_process_that_is_terminated_leaves_no_folder(tmp_path, there):
    if there:
        (tmp_path / "new").mkdir()
    code = "import os, signal\nfrom pathlib import Path\nfrom vqhit.files import new_folder\n"
    code += "with new_folder(Path('new')) as folder:\n    (folder / 'a').touch()\n"
    code += "    os.kill(os.getpid(), signal.SIGTERM)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 128 + 15
    assert list(tmp_path.rglob("*")) == ([tmp_path / "new"] if there else [])


def test_only_a_new_or_empty_folder_is_written(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new", tmp_path / "deep" / "new"):
        check_new_folder(folder)
    for folder, message in (
        (tmp_path, "not empty; give a new or empty folder"),
        (tmp_path / "file", "a file; give a new or empty folder"),
        (tmp_path / "file" / "new", "file is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            check_new_folder(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_lock_is_held_against_other_processes_until_it_is_closed(tmp_path):
    code = "import sys; from pathlib import Path; from vqhit.files import lock; lock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    held = lock(tmp_path / ".lock")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.stderr.splitlines()[-1] == f"vqhit.files.InUseError: process {os.getpid()} on {platform.node()}"
    held.close()
    assert subprocess.run(command, check=False).returncode == 0


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=r"has no locks \(no locks available\); let no second process write there"):
        lock(tmp_path / ".lock").close()
