"""A Hugging Face Hub of models on this machine: what its own client needs to publish and to fetch them, and faults."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_someone"
_LFS_BYTES = 10_000
"""Files from this size on go through Git LFS, as the Hub's do from 10 MB on."""


class ModelHub:
    """Repositories in memory: branches, which are names of commits, which are files by their names."""

    def __init__(self):
        self.repositories = {}
        self.objects = {}
        self.asked = []
        """Method, path and range of each request."""
        self.cut = {}
        """File name -> after how many bytes the connection is cut, one number for each time."""
        self.broken = {}
        """Part of a path -> status that it is answered with."""
        self.headers = {}
        """Headers of every answer about a file that are not what they should be."""

    def commit(self, repo, branch, files, deleted=()):
        """Put files into a branch; returns the commit."""
        repository = self.repositories[repo]
        there = dict(repository["commits"].get(repository["branches"].get(branch), {}))
        there = {name: data for name, data in there.items() if name not in deleted} | files
        content = json.dumps(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in there.items()))
        sha = hashlib.sha1((content + str(len(repository["commits"]))).encode()).hexdigest()
        repository["commits"][sha] = there
        repository["branches"][branch] = sha
        return sha

    def create(self, repo, private=False, files=None):
        """Make a repository with a first commit."""
        self.repositories[repo] = {"private": private, "branches": {}, "commits": {}}
        return self.commit(repo, "main", {".gitattributes": b"", **(files or {})})

    def files(self, repo, revision="main"):
        """The files of a revision."""
        repository = self.repositories[repo]
        return repository["commits"][repository["branches"].get(revision, revision)]

    def answer(self, method, path, headers, body, address):
        """Status, headers and content of an answer."""
        for part, status in self.broken.items():
            if part in path:
                return status, {"X-Error-Message": "out of order"}, b""
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return 400, {}, b""
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        match = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", path)
        repo, rest = match[1], match[2] or ""
        repository = self.repositories.get(repo)
        if repository is None or (repository["private"] and not token):
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b""
        if rest.startswith("info/lfs/objects/batch"):
            return self._batch(json.loads(body), address)
        what, _, rest = rest.partition("/")
        revision, _, rest = unquote(rest).partition("/")
        writes = method == "POST" and what in ("branch", "commit", "preupload")
        if writes and not token:
            return 401, {}, b""
        if what == "branch":
            if revision in repository["branches"]:
                return 409, {"X-Error-Message": "Reference already exists"}, b""
            repository["branches"][revision] = repository["branches"]["main"]
            return as_json({})
        commit = repository["branches"].get(revision or "main", revision)
        if commit not in repository["commits"]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = repository["commits"][commit]
        if what == "resolve":
            return self._file(files, rest, commit)
        if what == "preupload":
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= _LFS_BYTES else "regular"} for f in wanted]
            return as_json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if what == "commit":
            return self._take(repo, revision, body, address)
        if what == "tree":
            return as_json([{"type": "file", "path": n, "size": len(d), "oid": oid(d)} for n, d in files.items()])
        return as_json(
            {
                "id": repo,
                "sha": commit,
                "private": repository["private"],
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def _create(self, wanted, token):
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if not token:
            return 401, {}, b""
        if not repo.startswith("someone/"):
            return 403, {"X-Error-Message": "You don't have the rights"}, b""
        if repo in self.repositories:
            url = f"https://huggingface.co/{repo}"
            return 409, {"X-Error-Message": "You already created this model repo"}, json.dumps({"url": url}).encode()
        self.create(repo, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return as_json({"url": f"https://huggingface.co/{repo}", "name": repo})

    def _batch(self, wanted, address):
        objects = []
        for entry in wanted["objects"]:
            known = entry["oid"] in self.objects
            upload = {} if known else {"actions": {"upload": {"href": f"{address}/lfs/{entry['oid']}", "header": {}}}}
            objects.append({**entry, **upload})
        return as_json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _take(self, repo, branch, body, address):
        files, deleted, parent = {}, [], None
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                parent = line["value"].get("parentCommit")
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                deleted.append(line["value"]["path"])
        if parent not in (None, self.repositories[repo]["branches"][branch]):
            return 412, {"X-Error-Message": "A commit has happened since"}, b"{}"
        sha = self.commit(repo, branch, files, deleted)
        return as_json({"commitUrl": f"{address}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def _file(self, files, name, commit):
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        data = files[name]
        return 200, {**headers, "ETag": f'"{oid(data)}"', "Accept-Ranges": "bytes", **self.headers}, data


def oid(data):
    """What the Hub calls a file: the sha256 of a large one, Git's hash of a small one."""
    if len(data) >= _LFS_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def as_json(value, kind="application/json"):
    """An answer."""
    return 200, {"Content-Type": kind}, json.dumps(value).encode()


@contextmanager
def served(hub=None):
    """Serve a Hub; yields it and its address."""
    hub = hub or ModelHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '-')}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw = urlsplit(self.path).path
            status, headers, data = hub.answer(self.command, raw, self.headers, body, address)
            size = len(data)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if status == 200 and wanted:
                end = int(wanted[2] or size - 1)
                headers["Content-Range"] = f"bytes {wanted[1]}-{end}/{size}"
                status, data = 206, data[int(wanted[1]) : end + 1]
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            name = path.rpartition("/")[2]
            if "/resolve/" in path and hub.cut.get(name):
                self.wfile.write(data[: hub.cut[name].pop(0)])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
            self.wfile.write(data)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # of a connection that was cut on purpose

    server = Server(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, address
    finally:
        server.shutdown()
        server.server_close()
