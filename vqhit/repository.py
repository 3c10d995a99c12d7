"""Repositories of the Hugging Face Hub: files down from one commit, files up in one commit; every error is one line.

The client is `huggingface_hub`: its cache, token and environment variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE,
HF_ENDPOINT) hold. Nothing is executed that a repository holds, and no file is asked for but those named here.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0
"""Without an answer about a file."""


class HubError(ValueError):
    """Something that the Hub does not give, or does not take; the message says what and why."""


def checked_revision(revision: str) -> str:
    """A branch, tag or commit as it is; raises `HubError` for what cannot be one."""
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise HubError(f"revision {revision!r}: allowed: a branch, a tag or a commit, of letters, digits, - _ . and /")
    return revision


def _checked_token(token: str | bool | None) -> str | bool | None:
    """A token without the line's end that its file may have had; raises `HubError`, which does not tell it."""
    if not isinstance(token, str):
        return token
    if not (stripped := token.strip()) or not stripped.isascii() or not stripped.isprintable():
        raise HubError("token: holds something else than a token's letters and digits")
    return stripped


def split_id(text: str) -> tuple[str, str | None] | None:
    """`owner/name` or `owner/name@revision` (branch, tag, commit) -> id and revision; None for anything else.

    Raises `HubError` for a revision that cannot be one.
    """
    name, at, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name or name.endswith(".git"):
        return None
    return name, checked_revision(revision) if at else None


def download(
    repo_id: str,
    names: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """Fetch files of one commit into the Hub's cache, or find them there; returns their folder and the commit.

    What the first file's answer says is the commit of them all. After a connection was cut the rest is asked for, some
    times; a file has its name once it is whole. Raises `HubError`.
    """
    found: list[Path] = []
    commit = None if revision is None else checked_revision(revision)
    for name in names:
        path = _fetch(repo_id, name, commit, token, cache_dir, local_files_only)
        if not found:
            commit = path.parent.name
            if not _COMMIT.fullmatch(commit):
                raise HubError(f"{repo_id}: the server's name of its commit is {commit[:60]!r}; no file of it is used")
        found.append(path)
    folder = found[0].parent
    assert commit is not None
    if any(path.parent != folder for path in found):
        raise HubError(f"{repo_id}: the server gives files of another commit than {commit}; none is used")
    return folder, commit


def has_file(repo_id: str, name: str, commit: str) -> bool:
    """Whether a commit holds a file, which is fetched if it does; raises `HubError` where that cannot be known."""
    from huggingface_hub import _CACHED_NO_EXIST, errors, try_to_load_from_cache

    try:
        _fetch(repo_id, name, commit, None, None, local_files_only=False)
    except HubError as error:
        unknown = isinstance(error.__cause__, errors.LocalEntryNotFoundError)
        if isinstance(error.__cause__, errors.EntryNotFoundError) and not unknown:
            return False
        if unknown and try_to_load_from_cache(repo_id, name, revision=commit) is _CACHED_NO_EXIST:
            return False
        raise
    return True


def _fetch(
    repo_id: str,
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: Path | str | None,
    local_files_only: bool,
) -> Path:
    import huggingface_hub

    from vqhit import __version__

    token = _checked_token(token)
    with _told(repo_id, name, revision):
        path = huggingface_hub.hf_hub_download(
            repo_id,
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            etag_timeout=_TIMEOUT_S,
            library_name="vqhit",
            library_version=__version__,
        )
    found = Path(path)
    if not found.resolve().is_relative_to(found.parents[2].resolve()):  # its content lies where the server said
        raise HubError(
            f"{repo_id}/{name}: lies outside the cache, at {found.resolve()}, where the server put it; it is not used"
        )
    return found


def upload(
    repo_id: str,
    files: dict[str, Path | bytes],
    *,
    replaces: Sequence[str] = (),
    branch: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
    message: str,
) -> str:
    """Put files into a repository in one commit and return its address; both are made if they are not there.

    Those of `replaces` that are in the repository and not among `files` are removed in the same commit. Raises
    `HubError`: before anything is sent, if a repository that is to be private is public; without a commit, if somebody
    else has made one meanwhile. A repository or branch that was made for it stays then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if branch is not None:
        checked_revision(branch)
    if not message.strip():
        raise HubError("message: found an empty one; a commit needs some text")
    api = HfApi(token=_checked_token(token), library_name="vqhit")
    with _told(repo_id, None, branch):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise HubError(f"{repo_id}: is there already, and public; make it private on the Hub, or name another one")
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        before = api.repo_info(repo_id, revision=branch)
        there = set(api.list_repo_files(repo_id, revision=before.sha))
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        old = [CommitOperationDelete(path_in_repo=name) for name in replaces if name in there and name not in files]
        commit = api.create_commit(
            repo_id, [*operations, *old], commit_message=message, revision=branch, parent_commit=before.sha
        )
    return str(commit.commit_url)


@contextmanager
def _told(repo_id: str, name: str | None, revision: str | None) -> Iterator[None]:
    """Turn the client's errors, which are paragraphs, into one line each that says what can be done."""
    from huggingface_hub import errors, logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # or it tells of every try
    what = f"{repo_id}: " if name is None else f"{repo_id}/{name}: "
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(f"{what}gated; ask for access on its page, then `hf auth login`, or give a token") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what}no revision {revision!r}; allowed: a branch, a tag or a commit's 40 digits") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(f"{what}not in the cache{at}, and the Hub cannot be asked ({_cause(error)})") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{what}no such file{at}; a model has config.json and model.safetensors, no pickle") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what}no such repository on the Hub, or a private one (HTTP {error.response.status_code}); if it is, "
            "`hf auth login`, or give a token"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{what}HF_HUB_OFFLINE is set, and this needs the Hub") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{what}{_cause(error)}") from error
    except Exception as error:  # the transport's library raises its own, and OSError is the disk's
        again = "" if isinstance(error, ValueError) else "; the same command tries again"
        raise HubError(f"{what}{type(error).__name__}: {_line(error)}{again}") from error
    finally:
        logging.set_verbosity(before)


def _cause(error: BaseException) -> str:
    """What happened: the status of an answer, or the last cause."""
    while True:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            what = f"refused, HTTP {response.status_code}"
            return f"{what}: the token is not valid or may not do this; `hf auth login` again"
        if response is not None and response.status_code in (409, 412):
            return f"HTTP {response.status_code}: somebody else has changed it meanwhile; the same command tries again"
        if response is not None:
            return f"the Hub answers HTTP {response.status_code}"
        if (cause := error.__cause__ or error.__context__) is None:
            return _line(error)
        error = cause


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
