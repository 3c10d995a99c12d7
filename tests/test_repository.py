"""The Hub's own client against a server that answers as the Hub does: publishing, fetching, and what can go wrong."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from tests.model_hub import TOKEN, oid, served
from vqhit import VQHiT
from vqhit.hub import repository_id
from vqhit.repository import HubError, split_id

LOAD = """
import json, os, sys
import torch
from vqhit import HiTGenerator, VQHiT

classes = {"VQHiT": VQHiT, "HiTGenerator": HiTGenerator}
for name, path, options in json.loads(sys.argv[1]):
    try:
        model = classes[name].from_pretrained(path, **options)
        print(json.dumps(float(model.state_dict()["quantizer.codebook"].double().sum())))
    except ValueError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def environment(address, home, **more):
    """Of a user whose Hub is the server's, who is logged in and has an empty cache; without the Xet protocol."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return known | own | more


def load(env, *wanted):
    """What a fresh process finds, one after the other: the sum of the codebook, or the error, on one line."""
    wanted = [("VQHiT", *entry) if isinstance(entry, tuple) else ("VQHiT", entry, {}) for entry in wanted]
    command = [sys.executable, "-c", LOAD, json.dumps(wanted)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(wanted)
    return found


def push(env, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "vqhit", "push", *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=120,
    )


def content(model, folder):
    model.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def codes(model):
    return pytest.approx(float(model.quantizer.codebook.detach().double().sum()), abs=1e-6)


@pytest.fixture
def published(tiny_model, tmp_path):
    """A Hub with someone/tiny: two commits on main, the first one tagged v1; yields it, its address, the two files."""
    files = content(tiny_model, tmp_path / "model")
    with served() as (hub, address):
        hub.create("someone/tiny")
        hub.repositories["someone/tiny"]["branches"]["v1"] = hub.commit("someone/tiny", "main", files)
        tiny_model.quantizer.codebook.data += 1
        hub.commit("someone/tiny", "main", content(tiny_model, tmp_path / "model"))
        yield hub, address, files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("someone/tiny", ("someone/tiny", None)),
        ("some.one/t-i_ny.v2@refs/pr/1", ("some.one/t-i_ny.v2", "refs/pr/1")),
        ("someone/tiny.git", None),
        ("someone/tíny", None),
        ("someone/x.", None),
        ("someone/" + 97 * "x", None),
        ("someone/..", None),
        ("../tiny", None),
        ("someone/tiny/model", None),
        ("/someone/tiny", None),
        ("someone/tiny\n", None),
        ("someone/ti ny", None),
        ("tiny", None),
        ("", None),
    ],
)
def test_an_id_is_an_owner_and_a_name(text, expected):
    assert split_id(text) == expected


@pytest.mark.parametrize("revision", ["", "..", "a b", "-x", "../main", "v1\n"])
def test_what_can_be_no_revision_is_refused_before_anything_is_asked(tiny_model, revision):
    with pytest.raises(HubError, match=r"revision .*: allowed: a branch, a tag or a commit"):
        VQHiT.from_pretrained("someone/tiny", revision=revision)
    with pytest.raises(HubError, match=r"revision .*: allowed: a branch"):
        VQHiT.from_pretrained(f"someone/tiny@{revision}")
    with pytest.raises(HubError, match=r"revision .*: allowed: a branch"):
        tiny_model.push_to_hub("someone/tiny", branch=revision)


@pytest.mark.parametrize("token", ["hf_secret\nx", "", " ", "hf_sécret"])
def test_a_token_that_is_none_is_refused_and_not_told(tiny_model, token):
    for use in (
        lambda: VQHiT.from_pretrained("someone/tiny", token=token),
        lambda: tiny_model.push_to_hub("someone/tiny", token=token),
    ):
        with pytest.raises(HubError, match="token: holds something else") as caught:
            use()
        assert "cret" not in str(caught.value)


def test_what_is_no_id_cannot_be_published_to(tiny_model):
    for text in ("tiny", "someone/tiny@v1", "../x", ""):
        with pytest.raises(HubError, match="no id of a repository on the Hub; allowed: owner/name"):
            repository_id(text)
        with pytest.raises(HubError, match="no id of a repository"):
            tiny_model.push_to_hub(text)


def test_what_is_pushed_comes_back_by_revision_and_offline(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "first")
    first = codes(tiny_model)
    with served() as (hub, address):
        env = environment(address, tmp_path / "home")
        result = push(env, tmp_path / "first", "someone/tiny", "--private", "--license", "mit")
        assert result.returncode == 0, result.stderr
        commit = hub.repositories["someone/tiny"]["branches"]["main"]
        assert result.stdout.splitlines()[-1] == f"{address}/someone/tiny/commit/{commit}"
        assert hub.repositories["someone/tiny"]["private"]
        for name in ("config.json", "model.safetensors"):
            assert hub.files("someone/tiny")[name] == (tmp_path / "first" / name).read_bytes()
        assert "license: mit" in hub.files("someone/tiny")["README.md"].decode()
        tiny_model.quantizer.codebook.data += 1
        tiny_model.save_pretrained(tmp_path / "second")
        assert push(env, tmp_path / "second", "someone/tiny", "--branch", "new").returncode == 0
        assert hub.repositories["someone/tiny"]["branches"]["main"] == commit
        assert 'revision="new"' in hub.files("someone/tiny", "new")["README.md"].decode()
        hub.asked.clear()
        second = codes(tiny_model)
        assert load(
            env,
            "someone/tiny",
            ("someone/tiny", {"revision": "new"}),
            "someone/tiny@new",
            f"someone/tiny@{commit}",
            ("someone/tiny", {"revision": "new", "cache_dir": str(tmp_path / "other")}),
        ) == [first, second, second, first, second]
        assert (tmp_path / "other" / "models--someone--tiny").is_dir()
        gets = [line.split()[1].rpartition("/")[2] for line in hub.asked if line.startswith("GET /someone")]
        assert sorted(set(gets)) == ["config.json", "model.safetensors"]  # nothing else is asked for
        assert len(gets) == 2 + 1 + 2  # the two configurations are the same file
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for offline in (environment(address, tmp_path / "home", HF_HUB_OFFLINE="1"), env | gone):
        found = load(
            offline,
            "someone/tiny",
            "someone/tiny@new",
            ("someone/tiny", {"local_files_only": True}),
            ("someone/tiny@v9", {"local_files_only": True}),
        )
        assert found[:3] == [first, second, first]
        assert found[3].startswith("HubError: someone/tiny/config.json: not in the cache at revision 'v9'")


def test_a_push_removes_what_only_an_older_one_had(tiny_model, tmp_path):
    files = content(tiny_model, tmp_path / "model")
    with served() as (hub, address):
        hub.create("someone/tiny", files={"discriminator.safetensors": b"old", "notes.txt": b"kept"})
        result = push(environment(address, tmp_path), tmp_path / "model", "someone/tiny")
        assert result.returncode == 0, result.stderr
        there = hub.files("someone/tiny")
    assert sorted(there) == [".gitattributes", "README.md", "config.json", "model.safetensors", "notes.txt"]
    assert there["model.safetensors"] == files["model.safetensors"]


def test_configuration_and_weights_are_of_one_commit(published, tiny_model, tmp_path):
    """Somebody pushes between the two requests: the weights are still those of the configuration's commit."""
    hub, address, _ = published
    answered = hub.answer

    def answer(method, path, *rest):
        found = answered(method, path, *rest)
        if method == "GET" and path.endswith("config.json"):
            hub.commit("someone/tiny", "main", {"model.safetensors": b"of another model"})
        return found

    hub.answer = answer
    assert load(environment(address, tmp_path / "home"), "someone/tiny") == [codes(tiny_model)]
    assert hub.files("someone/tiny")["model.safetensors"] == b"of another model"


def test_a_connection_that_is_cut_is_resumed_or_fails_with_no_half_file_in_use(published, tiny_model, tmp_path):
    """With a file of 34 MB, since the client writes 10 MiB at a time."""
    hub, address, _ = published
    quantizer = tiny_model.config.quantizer.model_copy(update={"codebook_size": 2**20})
    tiny_model = VQHiT(tiny_model.config.model_copy(update={"quantizer": quantizer}))
    hub.commit("someone/tiny", "main", content(tiny_model, tmp_path / "large"))
    hub.cut["model.safetensors"] = [25_000_000]
    env = environment(address, tmp_path / "once")
    assert load(env, "someone/tiny") == [codes(tiny_model)]
    ranges = [line.rpartition(" ")[2] for line in hub.asked if line.startswith("GET") and "model.safetensors" in line]
    assert ranges == ["-", f"bytes={2 * 10 * 2**20}-"]  # the second one asks for the rest

    hub.cut["model.safetensors"] = [25_000_000, *[0] * 20]
    env = environment(address, tmp_path / "always")
    (failed,) = load(env, "someone/tiny")
    assert failed.startswith("HubError: someone/tiny/model.safetensors: ")
    assert "the same command tries again" in failed
    assert not list((tmp_path / "always").rglob("snapshots/*/model.safetensors"))
    assert all(path.stat().st_size < 10_000 for path in (tmp_path / "always").rglob("blobs/*"))
    (offline,) = load(env | {"HF_HUB_OFFLINE": "1"}, "someone/tiny")
    assert offline.startswith("HubError: someone/tiny/model.safetensors: not in the cache at revision ")
    hub.cut.clear()
    assert load(env, "someone/tiny") == [codes(tiny_model)]


def test_a_push_beside_somebody_elses_is_refused_as_a_whole(published, tmp_path):
    hub, address, _ = published
    answered = hub.answer

    def answer(method, path, *rest):
        if "/preupload/" in path:
            hub.commit("someone/tiny", "main", {"README.md": b"theirs"})
        return answered(method, path, *rest)

    hub.answer = answer
    result = push(environment(address, tmp_path / "home"), tmp_path / "model", "someone/tiny")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "vqhit: someone/tiny: HTTP 412: somebody else has changed it meanwhile; the same command tries again"
    )
    assert hub.files("someone/tiny")["README.md"] == b"theirs"


def test_each_refusal_is_one_line_that_says_what_to_do(published, tiny_model, tmp_path):
    hub, address, _ = published
    hub.create("someone/hidden", private=True, files=hub.files("someone/tiny"))
    hub.create("someone/pickled", files={"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})
    hub.create("someone/generator", files=hub.files("someone/tiny"))
    hub.create("someone/broken", files=hub.files("someone/tiny"))
    hub.broken["/someone/broken/resolve"] = 403
    wrong = {"token": "hf_wrong"}
    found = load(
        environment(address, tmp_path / "home"),
        "someone/none",
        "someone/tiny@v9",
        "someone/pickled",
        ("someone/hidden", {"token": False}),
        ("someone/tiny", wrong),
        "someone/broken",
        ("someone/tiny@v1", {"revision": "v1"}),
        ("vqhit-tiny-64", {"revision": "v1"}),
        ("someone/hidden", {}),
    )
    folder = "; and there is no folder "
    refused = "refused, HTTP {}: the token is not valid or may not do this; `hf auth login` again"
    assert found[:8] == [
        "HubError: someone/none/config.json: no such repository on the Hub, or a private one (HTTP 404); if it is, "
        f"`hf auth login`, or give a token{folder}someone/none",
        "HubError: someone/tiny/config.json: no revision 'v9'; allowed: a branch, a tag or a commit's 40 digits"
        f"{folder}someone/tiny@v9",
        f"HubError: someone/pickled/model.safetensors: no such file at revision '{sha(hub, 'someone/pickled')}'; a "
        f"model has config.json and model.safetensors, no pickle{folder}someone/pickled",
        "HubError: someone/hidden/config.json: no such repository on the Hub, or a private one (HTTP 401); if it is, "
        f"`hf auth login`, or give a token{folder}someone/hidden",
        f"HubError: someone/tiny/config.json: {refused.format(401)}{folder}someone/tiny",
        "HubError: someone/broken/config.json: not in the cache, and the Hub cannot be asked "
        f"({refused.format(403)}){folder}someone/broken",
        "ValueError: someone/tiny@v1: names a revision, and revision 'v1' is given; leave one out",
        "ValueError: revision 'v1': vqhit-tiny-64 is a folder, not a repository of the Hub; leave it out",
    ]
    assert found[8] == codes(tiny_model)


def sha(hub, repo):
    return hub.repositories[repo]["branches"]["main"]


def test_a_push_that_is_refused_changes_nothing(published, tmp_path):
    hub, address, _ = published
    before = {repo: dict(state["branches"]) for repo, state in hub.repositories.items()}
    model, env = tmp_path / "model", environment(address, tmp_path / "home")
    for options, repo, message in (
        ({"HF_TOKEN": "hf_wrong"}, "someone/tiny", "someone/tiny: refused, HTTP 401: the token is not valid"),
        ({}, "another/tiny", "another/tiny: refused, HTTP 403: the token"),
        ({"HF_HUB_OFFLINE": "1"}, "someone/tiny", "someone/tiny: HF_HUB_OFFLINE is set, and this needs the Hub"),
        ({}, "someone/tiny --private", "someone/tiny: is there already, and public; make it private on the Hub"),
    ):
        result = push(env | options, model, *repo.split())
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"vqhit: {message}")
    assert {repo: dict(state["branches"]) for repo, state in hub.repositories.items()} == before


def test_a_server_whose_names_leave_the_cache_is_refused(published, tmp_path):
    hub, address, _ = published
    home = tmp_path / "home" / "a" / "b" / "c"
    hub.headers = {"X-Repo-Commit": "../../../../../evil"}
    (found,) = load(environment(address, home), "someone/tiny")
    assert found.startswith("HubError: someone/tiny/config.json: ValueError: Invalid pointer path")
    assert not list(tmp_path.rglob("evil*"))
    hub.headers = {"ETag": "../../../../../evil"}  # which the client does not check
    (found,) = load(environment(address, home), "someone/tiny")
    assert found.startswith("HubError: someone/tiny/config.json: lies outside the cache, at ")


def test_another_class_is_named(published, tmp_path):
    _, address, _ = published
    command = [sys.executable, "-c", LOAD, json.dumps([("HiTGenerator", "someone/tiny", {})])]
    result = subprocess.run(command, env=environment(address, tmp_path), capture_output=True, text=True, check=True)
    assert "config.json: holds a VQHiT, not a HiTGenerator" in result.stdout


def test_tokens_name_the_commit_of_their_tokenizer_and_are_decoded_by_it(published, tmp_path, photo_folder):
    """Also after somebody has pushed another model to the branch."""
    hub, address, _ = published
    env = environment(address, tmp_path / "home")
    options = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True, "check": False, "timeout": 120}
    command = [sys.executable, "-m", "vqhit"]
    tokenize = [*command, "tokenize", "--model", "someone/tiny", "--data", "photos", "--out", "tokens"]
    result = subprocess.run(tokenize, **options)
    assert result.returncode == 0, result.stderr
    made_by = json.loads((tmp_path / "tokens" / "manifest.json").read_text())["model"]
    weights = hub.files("someone/tiny")["model.safetensors"]
    assert (made_by["id"], made_by["revision"]) == ("someone/tiny", sha(hub, "someone/tiny"))
    assert made_by["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    hub.commit("someone/tiny", "main", {"config.json": b"{}"})
    result = subprocess.run([*command, "detokenize", "tokens", "--out", "pictures"], **options)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "pictures").iterdir())) == 6


def test_the_server_of_these_tests_names_files_as_git_does():
    assert oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_a_folder_of_that_name_goes_first(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("someone/tiny")
    assert VQHiT.from_pretrained("someone/tiny").config == tiny_model.config
