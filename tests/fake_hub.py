"""A Hugging Face Hub of one public data set, served from a folder: what its own client needs to find and read it."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder, name="someone/photos", revision="main", private="someone/private"):
    """Serve a folder as a data set; yields the server's address and a list that the paths asked for are added to."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}") if length else {}
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            status, headers, data = answer(unquote(urlsplit(self.path).path), body, recursive)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if status == 200 and wanted:
                end = int(wanted[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {wanted[1]}-{end}/{len(data)}"
                status, data = 206, data[int(wanted[1]) : end + 1]
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_POST = do_GET  # noqa: N815

    def answer(path, body, recursive):
        if f"/{private}" in path:
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        if f"/datasets/{name}" not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        call = re.match(rf"/(api/)?datasets/{name}(?:/(revision|tree|paths-info|resolve)/([^/]+))?(?:/(.*))?$", path)
        if call is None or call[3] not in (None, revision, COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        if call[2] == "resolve":
            file = Path(folder) / call[4]
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            data = file.read_bytes()
            return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data
        if call[2] == "tree":
            below = Path(folder) / (call[4] or "")
            return as_json([entry(path) for path in sorted(below.rglob("*") if recursive else below.glob("*"))])
        if call[2] == "paths-info":
            there = [Path(folder) / path for path in body.get("paths", [])]
            return as_json([entry(file) for file in there if file.exists()])
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        return as_json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings, "downloads": 0})

    def entry(file):
        kind = "directory" if file.is_dir() else "file"
        oid = hashlib.sha1(str(file).encode()).hexdigest()
        return {"type": kind, "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

    def as_json(value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
