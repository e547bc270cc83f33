"""From a name that a user gives to a folder of files: local, or of a Hugging Face repository.

A local folder involves no network and does not even import huggingface_hub. A repository id goes
through `huggingface_hub.snapshot_download`, which keeps the cache, resumes downloads and shows the
progress; only the files that a model, adapter or tokenizer needs are fetched, no pickles, no code.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, CheckpointError, LoadError, SourceError
from .atomic import is_leftover, recover
from .download_check import check_new_weights
from .shards import shard_names

# The name that stands for the model which comes with the package.
EMBEDDED = "purelm/tiny"
_EMBEDDED_FOLDER = Path(__file__).parent.parent / "data" / "tiny"

# Everything but the shards, whose names the index knows.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "quantize_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
_STEMS = ("model", "adapter_model")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py", "*.so", "*.h5")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Source:
    """Where a name led: a folder (or one GGUF file) here, and for a repository its commit.

    `files` are the names of what lies in `folder` itself; `revision` is a commit's sha, and None
    for a folder that is no snapshot of the cache.
    """

    name: str
    folder: Path
    revision: str | None
    is_local: bool
    files: tuple[str, ...]


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    endpoint: str | None = None,
) -> Source:
    """The folder that holds the model, adapter or tokenizer `name`, downloaded if need be.

    A folder of that name wins over a repository, and `EMBEDDED` is the package's own. `token` goes
    into this call's requests only (None leaves huggingface_hub its own, False sends none). With
    `local_files_only`, and in huggingface_hub's offline mode, the cache alone is asked; a commit's
    sha that is cached needs no request either. `allow_patterns` replaces the choice of files and
    then asks for no weights.
    Raises SourceError when the name leads nowhere, CheckpointError when a repository has no
    safetensors weights.
    """
    name = os.fspath(name)
    _check_arguments(name, token, subfolder)
    path = Path(name).expanduser()
    if is_leftover(path):
        raise SourceError("this is what an interrupted save left; it is no checkpoint", file=path)
    if not os.path.lexists(path):
        # Only an interrupted save on a file system that cannot exchange folders leaves this.
        recover(path)
    if path.is_dir():
        return _local(name, path, revision, subfolder)
    if path.suffix == ".gguf" and path.is_file():
        if revision is not None or subfolder is not None:
            raise ArgumentError("a GGUF file has neither revision nor subfolder; leave them out")
        return Source(name, path, None, True, (path.name,))
    if path.exists():
        raise SourceError("expected a folder or a repository id, found a file", file=path)
    if name == EMBEDDED:
        return _local(name, _EMBEDDED_FOLDER, revision, subfolder)
    if path.is_absolute() or name[0] in ".~" or "\\" in name or name.count("/") > 1:
        raise SourceError(f"there is no folder {name!r}; check the path", file=path)
    return _remote(
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
        allow_patterns=allow_patterns,
        endpoint=endpoint,
    )


def _check_arguments(name: str, token: str | bool | None, subfolder: str | None) -> None:
    if not name or "\0" in name:
        raise SourceError(f"expected a folder or a repository id, found {name!r}")
    check_token(token)
    if subfolder is not None and not all(_PLAIN.fullmatch(p) for p in subfolder.split("/")):
        raise ArgumentError(f"subfolder must be plain names joined by '/', found {subfolder!r}")


def check_token(token: str | bool | None) -> None:
    """Raise ArgumentError for a token that cannot stand in a request."""
    # The HTTP client's own message would show the header, with the token in it.
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ArgumentError("token must be printable ASCII without spaces; check how it was pasted")


def _local(name: str, path: Path, revision: str | None, subfolder: str | None) -> Source:
    real = Path(os.path.realpath(path))
    commit = None
    if real.parent.name == "snapshots" and _COMMIT.fullmatch(real.name):
        commit = real.name
    if revision is not None and revision != commit:
        raise ArgumentError(
            f"revision {revision!r} was asked for, but {name!r} is a local folder, which has "
            "none; leave revision out, or give a repository id"
        )
    folder = _subfolder(path, subfolder, real)
    return Source(name, folder, commit, True, _names(folder))


def _subfolder(folder: Path, subfolder: str | None, root: Path) -> Path:
    if subfolder is None:
        return folder
    inner = folder / subfolder
    if not inner.is_dir():
        raise SourceError(f"there is no subfolder {subfolder!r}", file=folder)
    if not Path(os.path.realpath(inner)).is_relative_to(root):
        raise SourceError(f"the subfolder {subfolder!r} is a link out of the folder", file=folder)
    return inner


def _names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError as problem:
        raise SourceError(
            f"the folder cannot be read: {problem.strerror}", file=folder
        ) from problem


def _remote(
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    subfolder: str | None,
    allow_patterns: Sequence[str] | None,
    endpoint: str | None,
) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    prefix = f"{subfolder}/" if subfolder else ""

    def download(patterns: Sequence[str], revision: str | None) -> Path:
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    token=token,
                    cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                    local_files_only=local_files_only,
                    allow_patterns=[prefix + pattern for pattern in patterns],
                    ignore_patterns=list(_NEVER),
                    endpoint=endpoint,
                )
            )
        except (HTTPError, OSError, ValueError, RuntimeError) as problem:
            raise _explain(problem, name, revision, token) from problem

    # A clock of a shared disk may be a little behind ours.
    since = time.time() - 5
    snapshot = download(FILES if allow_patterns is None else allow_patterns, revision)
    commit = snapshot.name
    if not snapshot.is_dir():
        raise SourceError(f"the repository {name!r} has none of the files that are needed")
    folder = _subfolder(snapshot, subfolder, Path(os.path.realpath(snapshot)))
    if allow_patterns is None:
        present = _names(folder)
        indices = [
            stem
            for stem in _STEMS
            if f"{stem}.safetensors.index.json" in present and f"{stem}.safetensors" not in present
        ]
        shards = [s for i in indices for s in shard_names(folder / f"{i}.safetensors.index.json")]
        if shards:
            download(shards, commit)
            present = _names(folder)
        elif not any(f"{stem}.safetensors" in present for stem in _STEMS):
            raise _no_weights(name, commit, token, endpoint, prefix, ask=not local_files_only)
        weights = [file for file in present if file.endswith(".safetensors")]
        check_new_weights(folder, weights, since)
    return Source(name, folder, commit, False, _names(folder))


def _no_weights(
    name: str,
    commit: str,
    token: str | bool | None,
    endpoint: str | None,
    prefix: str,
    *,
    ask: bool,
) -> LoadError:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    where = f"the repository {name!r} at {commit}"
    wanted = f"{prefix}model.safetensors or {prefix}model.safetensors.index.json"
    found: list[str] = []
    if ask:
        try:
            found = HfApi(endpoint=endpoint, token=token).list_repo_files(name, revision=commit)
        except (HTTPError, OSError):
            # Only the message would be better with the list.
            found = []
    weights = [f for f in found if f.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5"))]
    if any(f.endswith((".bin", ".pt", ".pth", ".ckpt")) for f in weights):
        return CheckpointError(
            f"{where} has only pickled weights ({', '.join(weights[:4])}), which are never loaded "
            f"because a pickle can run code; expected {wanted}: convert them to safetensors where "
            "you trust them, or take a revision that has them"
        )
    others = f", only {', '.join(weights[:4])}" if weights else ""
    return CheckpointError(f"{where} has no {wanted}{others}")


def _explain(
    problem: BaseException, name: str, revision: str | None, token: str | bool | None
) -> SourceError:
    from huggingface_hub import errors

    where = f"the repository {name!r}"
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, errors.HFValidationError):
        text = (
            f"{name!r} is neither a folder here nor a valid repository id ('owner/name'); check "
            "the spelling and the working directory"
        )
    elif isinstance(problem, errors.GatedRepoError):
        text = (
            f"{where} is gated: accept its licence on its page and pass token= (or set HF_TOKEN) "
            "of an account that has"
            if status == 401
            else f"{where} is gated and the token's account has no access: accept the licence on "
            "its page, or pass the token= of an account that has"
        )
    elif isinstance(problem, errors.RevisionNotFoundError):
        text = f"{where} has no revision {revision!r}; give a branch, a tag or a commit's sha"
    elif isinstance(problem, errors.RepositoryNotFoundError):
        text = (
            f"there is no folder {name!r} here and no such repository that this token may see; "
            "check the spelling, and pass token= if it is private"
        )
    elif status in (401, 403):
        text = f"the hub refused the token for {where} ({status}); pass a valid token="
    elif isinstance(problem, errors.LocalEntryNotFoundError):
        text = _not_cached(problem, where, revision)
    else:
        text = f"{where} could not be downloaded: {type(problem).__name__}: {first_line(problem)}"
    if isinstance(token, str):
        text = text.replace(token, "***")
    return SourceError(text)


def _not_cached(problem: BaseException, where: str, revision: str | None) -> str:
    from huggingface_hub import errors

    cause = problem.__cause__
    what = f"{where}, revision {revision or 'main'!r},"
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{what} is not, or not completely, in the cache and the network is switched off "
            "(local_files_only or HF_HUB_OFFLINE): download it once with the network on, or give "
            "the cache_dir that has it"
        )
    return (
        f"{what} is not, or not completely, in the cache and the hub cannot be reached: "
        f"{type(cause).__name__}: {first_line(cause)}; try again, or give a local folder"
    )


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, not too long."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"
