"""Sending a saved model to a repository of the Hugging Face hub: all of it in one commit.

The folder is saved whole first, then the repository is made if it is not there, the large files
are stored beside it, and one commit makes everything visible. A failure before that commit leaves
the repository's content as it was.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, UploadError
from .hub import check_token, first_line
from .model_card import CARD, model_card

if TYPE_CHECKING:
    from .bridge import CausalLM

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class Pushed:
    """What was sent, or with `dry_run` would be: names of files and their bytes.

    `url` is that of the commit, or of the pull request, and None after a dry run.
    """

    repo_id: str
    files: tuple[tuple[str, int], ...]
    url: str | None = None
    commit: str | None = None


def push(
    model: CausalLM | None,
    repo_id: str,
    save: Callable[[Path], Any],
    kind: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    temporary_location: str | None = None,
) -> Pushed:
    """Send what `save(folder)` writes, with a model's card, to `repo_id` ("owner/name" or "name").

    kind: what it is, for the card ("adapter", "merged" or "gguf"); a card that the repository has
    already stays. model: None for what has no card, a tokenizer alone. token: of an account that
    may write (None: huggingface_hub's own). private: of a repository that is made here. revision: a
    branch, made where it is missing. create_pr: as a pull request. dry_run: saves, sends nothing
    and asks nobody. temporary_location: the folder to save in (default: the system's), which must
    have room for all of it.

    Raises ArgumentError for arguments that cannot be, SaveError when saving fails, and UploadError
    when the hub refuses or cannot be reached; the repository's content is then as it was.
    """
    if not isinstance(repo_id, str) or not _REPO_ID.fullmatch(repo_id):
        raise ArgumentError(f"the repository is {repo_id!r:.200}, expected 'owner/name'")
    if create_pr and revision is not None:
        raise ArgumentError("a pull request goes to the main branch; leave revision out")
    if token is False and not dry_run:
        raise ArgumentError("token=False sends no token, and writing to the hub needs one")
    check_token(token)
    if temporary_location is not None and not Path(temporary_location).is_dir():
        raise ArgumentError(
            f"temporary_location is {temporary_location!r:.200}, expected a folder that is there"
        )
    message = commit_message or f"Upload {kind} made with purelm"
    if not dry_run:
        # A wrong token shows before the work of saving.
        _asked(lambda: _api(token).whoami(), repo_id, token)
    with tempfile.TemporaryDirectory(prefix="purelm-", dir=temporary_location) as made:
        folder = Path(made, "upload")
        save(folder)
        if model is not None and not (folder / CARD).exists():
            (folder / CARD).write_text(model_card(model, repo_id, kind, folder), encoding="utf-8")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        sizes = tuple((name, path.stat().st_size) for name, path in files.items())
        if dry_run:
            return Pushed(repo_id, sizes)
        done: Pushed = _asked(
            lambda: _send(repo_id, files, token, private, message, create_pr, revision),
            repo_id,
            token,
        )
        return done


def _api(token: str | bool | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _send(
    repo_id: str,
    files: dict[str, Path],
    token: str | bool | None,
    private: bool | None,
    message: str,
    create_pr: bool,
    revision: str | None,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd

    api = _api(token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if api.file_exists(repo_id, CARD, revision=revision):
        files = {name: path for name, path in files.items() if name != CARD}
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    done = api.create_commit(
        repo_id, operations, commit_message=message, create_pr=create_pr, revision=revision
    )
    sizes = tuple((name, path.stat().st_size) for name, path in files.items())
    return Pushed(repo_id, sizes, done.pr_url or done.commit_url, done.oid)


def _asked(ask: Callable[[], Any], repo_id: str, token: str | bool | None) -> Any:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        return ask()
    except (HTTPError, OSError, ValueError, RuntimeError) as problem:
        raise _explain(problem, repo_id, token) from problem


def _explain(problem: BaseException, repo_id: str, token: str | bool | None) -> UploadError:
    from huggingface_hub import errors

    where = f"the repository {repo_id!r}"
    if type(problem) is RuntimeError and problem.__cause__ is not None:
        # What went wrong with one file is wrapped in a sentence that says which.
        problem = problem.__cause__
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, errors.LocalTokenNotFoundError):
        text = "no token was found; pass token= of an account that may write, or set HF_TOKEN"
    elif status == 401:
        text = (
            f"the hub does not know the token for {where} (401); pass token= of an account that "
            "may write, from huggingface.co/settings/tokens"
        )
    elif status == 403:
        text = (
            f"the token may not write to {where} (403); pass one with write access, or give a name "
            "under your own account, or create_pr=True for somebody else's repository"
        )
    elif status == 404:
        text = (
            f"{where} or its revision does not exist or is hidden from this token (404); check the "
            "spelling and the token"
        )
    elif isinstance(problem, errors.OfflineModeIsEnabled):
        text = f"{where} cannot be reached while HF_HUB_OFFLINE is set; unset it"
    elif status is not None:
        text = f"the hub answered {status} for {where}: {first_line(problem)}; try again later"
    else:
        text = (
            f"{where} could not be written: {type(problem).__name__}: {first_line(problem)}; check "
            "the network and try again"
        )
    if isinstance(token, str):
        text = text.replace(token, "***")
    return UploadError(f"{text}. The repository's content is as it was")
