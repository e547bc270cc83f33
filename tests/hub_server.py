"""A stand-in for the hub's HTTP API on this machine, enough for huggingface_hub to download from
and, given `Uploads`, to write to.

    with Hub({"owner/name": {"main": folder, "v1": older}}, gated={"owner/name": "hf_good"}) as
    hub:
        resolve("owner/name", endpoint=hub.endpoint, cache_dir=..., token="hf_good")
        subprocess.run([...], env=os.environ | hub.environment(cache))

huggingface_hub reads HF_ENDPOINT when it is imported: give `endpoint`, run another process with
`environment`, or use `patched(monkeypatch, cache)`. No xet headers are sent, so that every byte
comes over plain HTTP. As on the hub, a gated repository shows its listing to everybody and
refuses its files: 401 without a token, 403 with another's. A private one answers 401 to
everything.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_upload import Uploads


@dataclass(frozen=True)
class Request:
    """One request that the hub got; `token` is what its Authorization header carried, `span` what
    its Range header asked for.
    """

    method: str
    path: str
    token: str | None
    span: str | None = None


@dataclass
class Hub:
    """Repositories as {id: {branch, tag or sha: folder}}, served while the `with` block runs.

    `faults` maps a file's name to what happens to its next GETs, one entry each: an int is a
    status to answer, "cut" ends the body halfway, "short" announces and sends half of it, "flip"
    changes a bit. `listed` adds paths to
    every listing (hostile ones too), served as empty files.
    """

    repos: Mapping[str, Mapping[str, Path]]
    gated: Mapping[str, str] = field(default_factory=dict)
    private: Mapping[str, str] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    log: list[Request] = field(default_factory=list)
    uploads: Uploads | None = None

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        from huggingface_hub.utils import close_session

        # Connections that huggingface_hub keeps open would outlive the server.
        close_session()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process that should see this hub needs in its environment."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def patched(self, monkeypatch: Any, cache: Path) -> Hub:
        """Turn the huggingface_hub of this process to this hub, for the length of a test."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        return self

    def sha(self, repo: str, revision: str = "main") -> str:
        """The commit that a branch or tag stands for: a digest of its folder's content."""
        if len(revision) == 40:
            return revision
        folder = self.repos[repo][revision]
        digest = hashlib.sha1(repo.encode())
        for name in _files(folder):
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
        return digest.hexdigest()

    def folder(self, repo: str, revision: str) -> Path | None:
        revisions = self.repos[repo]
        if revision in revisions:
            return revisions[revision]
        return next((f for r, f in revisions.items() if self.sha(repo, r) == revision), None)

    def files_got(self) -> list[str]:
        """The names of the files whose content was asked for, in order."""
        return [r.path.split("/resolve/")[1].split("/", 1)[1] for r in self.log if _is_file_get(r)]


def _is_file_get(request: Request) -> bool:
    return request.method == "GET" and "/resolve/" in request.path


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def _noted(self) -> Request:
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        path, span = unquote(urlsplit(self.path).path), self.headers.get("Range")
        request = Request(self.command, path, token, span)
        self.hub.log.append(request)
        return request

    def _write(self) -> None:
        request = self._noted()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.uploads is None:
            return self._refuse(403, "", "this hub takes no uploads")
        answer = self.hub.uploads.answer(self.hub, request, body, urlsplit(self.path).query)
        if isinstance(answer, int):
            return self._refuse(answer, "", "refused")
        self._json(answer, answer.pop("status", 200))

    def _serve(self) -> None:
        request = self._noted()
        path, token = request.path, request.token
        if path == "/api/whoami-v2" and self.hub.uploads is not None:
            if token not in self.hub.uploads.tokens:
                return self._refuse(401, "", "Invalid credentials")
            return self._json({"name": self.hub.uploads.tokens[token], "type": "user"})
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        repo = next((r for r in ("/".join(parts[:2]), parts[0]) if r in self.hub.repos), None)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if self.hub.private.get(repo, token) != token:
            return self._refuse(401, "RepoNotFound", "Repository not found")
        rest = parts[repo.count("/") + 1 :]
        if api:
            return self._api(repo, rest)
        # A revision with a slash in it ("refs/pr/1") is tried as the longest that is known.
        for end in range(len(rest) - 1, 1, -1):
            folder = self.hub.folder(repo, "/".join(rest[1:end]))
            if rest[0] == "resolve" and folder is not None:
                sha = self.hub.sha(repo, "/".join(rest[1:end]))
                return self._file(repo, sha, folder, "/".join(rest[end:]), token)
        self._refuse(404, "RevisionNotFound", "Invalid rev id")

    def _api(self, repo: str, rest: list[str]) -> None:
        kind = rest[0] if rest else "revision"
        revision = "/".join(rest[1:]) or "main"
        folder = self.hub.folder(repo, revision)
        if folder is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        names = [*_files(folder), *self.hub.listed]
        if kind == "revision":
            gated: str | bool = "manual" if repo in self.hub.gated else False
            info = {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": self.hub.sha(repo, revision),
                "private": repo in self.hub.private,
                "gated": gated,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": name} for name in names],
            }
            return self._json(info)
        if kind == "tree":
            return self._json([self._tree_entry(folder, name) for name in names])
        self._refuse(404, "EntryNotFound", "no such page")

    def _tree_entry(self, folder: Path, name: str) -> dict[str, object]:
        content = self._content(folder, name) or b""
        found: dict[str, object] = {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": _git_oid(content),
        }
        if name.endswith(".safetensors"):
            found["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 134,
            }
        return found

    def _content(self, folder: Path, name: str) -> bytes | None:
        if name in self.hub.listed:
            return b""
        path = folder / name
        return path.read_bytes() if ".." not in name and path.is_file() else None

    def _file(self, repo: str, sha: str, folder: Path, name: str, token: str | None) -> None:
        wanted = self.hub.gated.get(repo)
        if wanted is not None and token != wanted:
            return self._refuse(
                401 if token is None else 403, "GatedRepo", f"Access to model {repo} is restricted"
            )
        content = self._content(folder, name)
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit=sha)
        fault = None
        if self.command == "GET" and self.hub.faults.get(name):
            fault = self.hub.faults[name].pop(0)
        if isinstance(fault, int):
            return self._refuse(fault, "", "fault asked for")
        lfs = name.endswith(".safetensors")
        etag = hashlib.sha256(content).hexdigest() if lfs else _git_oid(content)
        if fault == "short":
            content = content[: len(content) // 2]
        total, start = len(content), 0
        span = self.headers.get("Range")
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start = int(first)
            content = content[start : int(last) + 1 if last else None]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{total}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        if lfs:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(total))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        content = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
