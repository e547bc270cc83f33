"""The part of the stand-in for the hub that takes uploads: repositories, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Uploads:
    """Accounts and what they sent.

    `tokens`: token -> account, which may write to "account/..." alone. `place`: an empty folder
    for what is sent. `refuse`: the step ("create", "branch", "preupload", "lfs", "put", "commit")
    -> the status to answer. `lost`: large files whose content is thrown away.
    """

    place: Path
    tokens: dict[str, str]
    refuse: dict[str, int] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)

    def answer(self, hub: Any, request: Any, body: bytes, query: str) -> Any:
        """What to answer a POST or PUT: JSON, or the number of a refusal."""
        parts = request.path.strip("/").split("/")
        if parts[0] == "put":
            if "put" in self.refuse:
                return self.refuse["put"]
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.objects[parts[1]] = body
            return {}
        account = self.tokens.get(request.token)
        if account is None:
            return 401
        if parts == ["api", "validate-yaml"]:
            return {"warnings": [], "errors": []}
        if parts == ["api", "repos", "create"]:
            made = json.loads(body)
            return self._create(hub, made, account)
        batch = request.path.endswith(".git/info/lfs/objects/batch")
        repo = request.path[1:].split(".git/")[0] if batch else "/".join(parts[2:4])
        step = "lfs" if batch else parts[4]
        if step in self.refuse:
            return self.refuse[step]
        if repo not in hub.repos:
            return 404
        pull = "create_pr=1" in query
        if repo.split("/")[0] != account and not pull:
            return 403
        if batch:
            return self._batch(hub, json.loads(body))
        revision = "/".join(parts[5:])
        if step == "branch":
            if revision in hub.repos[repo]:
                return 409
            hub.repos[repo][revision] = hub.repos[repo]["main"]
            return {}
        if revision not in hub.repos[repo]:
            return 404
        if step == "preupload":
            return {"files": [_mode(file) for file in json.loads(body)["files"]]}
        lines = [json.loads(line) for line in body.splitlines()]
        return self._commit(hub, repo, revision, lines, pull)

    def _create(self, hub: Any, made: dict[str, Any], account: str) -> Any:
        if "create" in self.refuse:
            return self.refuse["create"]
        owner = made["organization"] or account
        repo = f"{owner}/{made['name']}"
        if repo in hub.repos:
            if owner != account:
                return 403
            # The hub's answer to a name that is taken still says where it is.
            return {"status": 409, "url": f"{hub.endpoint}/{repo}"}
        if owner != account:
            return 403
        empty = self.place / repo.replace("/", "--") / "0"
        empty.mkdir(parents=True)
        hub.repos[repo] = {"main": empty}
        self.private[repo] = made.get("visibility") == "private" or bool(made.get("private"))
        return {"url": f"{hub.endpoint}/{repo}"}

    def _batch(self, hub: Any, asked: dict[str, Any]) -> Any:
        found = []
        for wanted in asked["objects"]:
            href = f"{hub.endpoint}/put/{wanted['oid']}"
            actions = {} if wanted["oid"] in self.objects else {"upload": {"href": href}}
            found.append({**wanted, **({"actions": actions} if actions else {})})
        return {"transfer": "basic", "objects": found}

    def _commit(
        self, hub: Any, repo: str, revision: str, lines: list[dict[str, Any]], pull: bool
    ) -> Any:
        before = hub.repos[repo][revision]
        after = self.place / repo.replace("/", "--") / str(len(self.commits) + 1)
        shutil.copytree(before, after)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
            else:
                content = base64.b64decode(value["content"])
            path = after / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        target = "refs/pr/1" if pull else revision
        hub.repos[repo][target] = after
        self.commits.append({"repo": repo, "revision": target, **lines[0]["value"]})
        sha = hub.sha(repo, target)
        made = {"commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha}
        return {**made, "pullRequestUrl": f"{hub.endpoint}/{repo}/discussions/1"}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith((".safetensors", ".gguf"))
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
