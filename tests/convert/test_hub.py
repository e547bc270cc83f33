"""Names: local folders without any network, repositories through a stand-in of the hub."""

import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import good, sharded
from hub_server import Hub, Request
from safetensors.torch import load_file, save_file

from purelm import FastLanguageModel
from purelm.convert.hub import Source, resolve
from purelm.convert.shards import open_checkpoint
from purelm.errors import AdapterError, ArgumentError, CheckpointError, LoadError, SourceError

ROOT = Path(__file__).resolve().parents[2]
GATED, SECRET = "org/gated", "hf_a_very_secret_token"
Resolve = Callable[..., Source]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A repository with one weight file and much that is not needed."""
    folder = good(tmp_path / "single")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"a second copy of the weights")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("hello")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"a third copy")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture
def hub(tmp_path: Path, single: Path) -> Iterator[Hub]:
    shards = good(tmp_path / "shards")
    sharded(shards)
    (shards / "model-00003-of-00002.safetensors").write_bytes(b"not in the index")
    newer = good(tmp_path / "newer")
    (newer / "generation_config.json").write_text("{}")
    pickled = good(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    inner = tmp_path / "outer"
    good(inner / "sub")
    repos = {
        "org/single": {"main": single, "v2": newer, "refs/pr/1": newer},
        "org/shards": {"main": shards},
        "org/pickled": {"main": pickled},
        "org/outer": {"main": inner},
        "org/private": {"main": single},
        GATED: {"main": single},
    }
    with Hub(repos, gated={GATED: SECRET}, private={"org/private": SECRET}) as served:
        yield served


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Resolve:
    """`resolve` from the stand-in into a fresh cache."""

    def call(name: str, **options: object) -> Source:
        options = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"} | options
        return resolve(name, **options)  # type: ignore[arg-type]

    return call


# Local folders.
def test_a_local_folder_needs_no_network_and_no_hub_library(tmp_path: Path) -> None:
    folder = good(tmp_path / "model")
    script = f"""
import socket, sys, torch
def closed(*args, **keywords):
    raise AssertionError("a socket was made")
socket.socket = socket.create_connection = socket.getaddrinfo = closed
from purelm import FastLanguageModel
from purelm.convert.hub import resolve
from purelm.convert.shards import open_checkpoint, read
source = resolve({str(folder)!r}, token="hf_x")
assert all(read(info) is not None for info in open_checkpoint(source.folder).in_file_order())
assert "huggingface_hub" not in sys.modules and source.is_local
"""
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good(tmp_path / "org" / "model")
    source = resolve(folder)
    assert source == Source(str(folder), folder, None, True, source.files)
    assert source.files == (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model").folder == Path("org/model")
    assert resolve("org", subfolder="model").folder == Path("org/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/model").folder == folder


def test_wrong_local_names(tmp_path: Path) -> None:
    folder = good(tmp_path / "model")
    (folder / "out").symlink_to(tmp_path)
    for name in (tmp_path / "gone", "./gone", "../gone", "a/b/c", "~/gone/gone", "C:\\gone"):
        with pytest.raises(SourceError, match="there is no folder"):
            resolve(name)
    with pytest.raises(SourceError, match="found a file"):
        resolve(folder / "config.json")
    with pytest.raises(SourceError, match="neither a folder here nor a valid repository id"):
        resolve("my model", local_files_only=True)
    for name in ("", "a\0b"):
        with pytest.raises(SourceError, match="expected a folder or a repository id"):
            resolve(name)
    with pytest.raises(ArgumentError, match="'v2' was asked for"):
        resolve(folder, revision="v2")
    with pytest.raises(SourceError, match="no subfolder 'sub'"):
        resolve(folder, subfolder="sub")
    with pytest.raises(SourceError, match="link out of the folder"):
        resolve(folder, subfolder="out")
    for subfolder in ("..", "a/../..", "/etc", "", "a//b", "*"):
        with pytest.raises(ArgumentError, match="subfolder must be plain names"):
            resolve(folder, subfolder=subfolder)


# Repositories.
def test_only_what_is_needed_is_downloaded(hub: Hub, fetch: Resolve, single: Path) -> None:
    source = fetch("org/single")
    assert source.name == "org/single" and not source.is_local
    assert source.revision == hub.sha("org/single") == source.folder.name
    wanted = [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(hub.files_got()) == wanted
    assert list(source.files) == ["additional_chat_templates", *wanted[1:]]
    for name in wanted:
        assert (source.folder / name).read_bytes() == (single / name).read_bytes()
    assert len(open_checkpoint(source.folder).tensors) == 21
    assert {request.token for request in hub.log} == {None}


def test_shards_are_those_of_the_index(hub: Hub, fetch: Resolve) -> None:
    source = fetch("org/shards")
    got = [name for name in hub.files_got() if name.endswith(".safetensors")]
    assert sorted(got) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert len(open_checkpoint(source.folder).tensors) == 21


def test_revisions(hub: Hub, fetch: Resolve) -> None:
    for revision in ("v2", hub.sha("org/single", "v2"), "refs/pr/1"):
        source = fetch("org/single", revision=revision)
        assert source.revision == hub.sha("org/single", "v2")
        assert "generation_config.json" in source.files
    assert "generation_config.json" not in fetch("org/single", revision="main").files
    with pytest.raises(SourceError, match="has no revision 'v3'"):
        fetch("org/single", revision="v3")


def test_subfolder(hub: Hub, fetch: Resolve) -> None:
    source = fetch("org/outer", subfolder="sub")
    assert source.folder.name == "sub" and "model.safetensors" in source.files
    assert len(open_checkpoint(source.folder).tensors) == 21
    with pytest.raises(SourceError, match="none of the files|no subfolder 'other'"):
        fetch("org/outer", subfolder="other")


def test_the_cache_answers_without_a_request(hub: Hub, fetch: Resolve, tmp_path: Path) -> None:
    sha = hub.sha("org/shards")
    first = fetch("org/shards")
    del hub.log[:]
    assert fetch("org/shards", revision=sha) == first
    assert fetch("org/shards", local_files_only=True) == first
    assert fetch("org/shards", local_files_only=True, revision=sha) == first
    assert hub.log == []
    # Asked for by a branch's name, the branch is looked up, and nothing is fetched twice.
    assert fetch("org/shards") == first
    assert hub.files_got() == []
    # The path that another library got from the cache is a name as well.
    assert resolve(first.folder).revision == sha


def test_offline_mode_of_the_library(hub: Hub, fetch: Resolve, tmp_path: Path) -> None:
    first = fetch("org/single")
    del hub.log[:]
    script = (
        "from purelm.convert.hub import resolve\n"
        "from purelm.errors import SourceError\n"
        "print(resolve('org/single').folder)\n"
        "try: resolve('org/shards')\n"
        "except SourceError as problem: print(problem)\n"
    )
    environment = os.environ | hub.environment(tmp_path / "cache") | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == str(first.folder)
    assert "not in the cache" in lines[1].replace("not, or not completely, in", "not in")
    assert "HF_HUB_OFFLINE" in lines[1]
    assert hub.log == []


def test_not_cached(fetch: Resolve) -> None:
    with pytest.raises(SourceError, match="in the cache and the network is switched off"):
        fetch("org/single", local_files_only=True)


def test_the_network_is_down(hub: Hub, fetch: Resolve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SourceError, match="the hub cannot be reached: ConnectError"):
        fetch("org/single", endpoint=nobody)
    first = fetch("org/single")
    assert fetch("org/single", endpoint=nobody) == first


def test_a_repository_that_is_not_there(fetch: Resolve) -> None:
    with pytest.raises(SourceError, match="no folder 'org/none' here and no such repository"):
        fetch("org/none")


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def shown(caught: pytest.ExceptionInfo[BaseException], caplog: pytest.LogCaptureFixture) -> str:
    """Everything that a user or a log could see of an exception."""
    whole = "".join(traceback.format_exception(caught.value))
    return whole + caplog.text + repr(caught.value)


@pytest.mark.usefixtures("no_token")
def test_gated(hub: Hub, fetch: Resolve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(SourceError, match="is gated: accept its licence.*pass token="):
        fetch(GATED)
    wrong = "hf_the_wrong_token"
    with pytest.raises(SourceError, match="token's account has no access") as caught:
        fetch(GATED, token=wrong)
    assert wrong not in shown(caught, caplog)
    del hub.log[:]
    assert "config.json" in fetch(GATED, token=SECRET).files
    assert {request.token for request in hub.log} == {SECRET}
    # The token was for that call alone.
    del hub.log[:]
    fetch("org/single")
    assert {request.token for request in hub.log} == {None}
    assert SECRET not in caplog.text


@pytest.mark.usefixtures("no_token")
def test_private(fetch: Resolve) -> None:
    with pytest.raises(SourceError, match="pass token= if it is private"):
        fetch("org/private")
    assert fetch("org/private", token=SECRET).files


@pytest.mark.usefixtures("no_token")
def test_the_token_of_the_environment_is_the_librarys(
    fetch: Resolve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert fetch(GATED).files
    with pytest.raises(SourceError, match="is gated"):
        fetch(GATED, token=False, cache_dir=tmp_path / "another")


@pytest.mark.parametrize("token", ["hf_abc\n", "hf abc", "hf_\u00e4", ""])
def test_a_token_that_no_header_can_carry(
    fetch: Resolve, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArgumentError, match="printable ASCII") as caught:
        fetch(GATED, token=token)
    assert not token.strip() or token.strip() not in shown(caught, caplog)


def test_pickles_only(fetch: Resolve, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never loaded.*convert them"):
        fetch("org/pickled")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_chosen_files(hub: Hub, fetch: Resolve) -> None:
    assert fetch("org/pickled", allow_patterns=["tokenizer*"]).files == (
        "tokenizer.json",
        "tokenizer_config.json",
    )
    assert fetch("org/single", allow_patterns=["*.bin", "*.py", "README.md"]).files == (
        "README.md",
    )


def test_hostile_listings_write_nothing_outside_the_cache(
    hub: Hub, fetch: Resolve, tmp_path: Path
) -> None:
    hub.listed = (
        "../../../../escaped.json",
        "/escaped.json",
        "additional_chat_templates/../../x.jinja",
    )
    try:
        fetch("org/single", allow_patterns=["*.json", "*.jinja"])
    except SourceError:
        pass
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.rglob("x.jinja"))
    assert not Path("/escaped.json").exists()


def test_a_hostile_index_downloads_nothing_it_names(
    hub: Hub, fetch: Resolve, tmp_path: Path
) -> None:
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="plain name"):
        fetch("org/shards")
    assert not [name for name in hub.files_got() if name.endswith(".safetensors")]


def test_the_base_of_an_adapter_is_of_the_adapters_revision(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on a branch, it finds those weights again, and is refused on others."""
    path = tmp_path / "newer" / "model.safetensors"
    weights = {name: 2 * w for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    hub.patched(monkeypatch, tmp_path / "cache")
    options: dict[str, Any] = {"load_in_4bit": False, "dtype": torch.float32, "device_map": "cpu"}
    model, _ = FastLanguageModel.from_pretrained("org/single", revision="v2", **options)
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), **options)
    assert again.origin.revision == hub.sha("org/single", "v2") != hub.sha("org/single")
    assert torch.equal(again.params["embed"]["weight"], weights["model.embed_tokens.weight"])
    other, _ = FastLanguageModel.from_pretrained("org/single", **options)
    with pytest.raises(AdapterError, match="other weights|another"):
        other.load_adapter(tmp_path / "adapter", "next")


# Downloads that go wrong.
def _is_get_of(request: Request, name: str) -> bool:
    return request.method == "GET" and request.path.endswith(name)


def _large(folder: Path, byte: int) -> bytes:
    """Weights of more than the library keeps in memory before it writes."""
    content = bytes([byte]) * (24 << 20)
    (folder / "model.safetensors").write_bytes(content)
    return content


def test_a_cut_download_goes_on_where_it_was_cut(hub: Hub, fetch: Resolve, single: Path) -> None:
    content = _large(single, 1)
    hub.faults["model.safetensors"] = ["cut"]
    source = fetch("org/single")
    assert (source.folder / "model.safetensors").read_bytes() == content
    first, second = (r.span for r in hub.log if _is_get_of(r, "model.safetensors"))
    assert first is None and second is not None
    start = int(second.removeprefix("bytes=").split("-")[0])
    assert 8 << 20 <= start <= 12 << 20


def test_a_failed_download_keeps_the_files_it_has(hub: Hub, fetch: Resolve, single: Path) -> None:
    """What was half fetched when it failed is begun again: the library keeps no part of a file."""
    hub.faults["model.safetensors"] = [404]
    with pytest.raises(SourceError):
        fetch("org/single")
    del hub.log[:]
    assert len(open_checkpoint(fetch("org/single").folder).tensors) == 21
    assert hub.files_got() == ["model.safetensors"]


@pytest.mark.full
def test_what_changed_since_it_was_cut_is_begun_again(
    hub: Hub, fetch: Resolve, single: Path, tmp_path: Path
) -> None:
    _large(single, 1)
    hub.faults["model.safetensors"] = ["cut", *[503] * 20]
    with pytest.raises(SourceError):
        fetch("org/single")
    del hub.faults["model.safetensors"]
    content = _large(single, 2)
    source = fetch("org/single")
    assert (source.folder / "model.safetensors").read_bytes() == content
    assert [p.stat().st_size for p in source.folder.glob("*.safetensors")] == [len(content)]


def test_a_file_of_another_size_does_not_stay(hub: Hub, fetch: Resolve, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = ["short"] * 8
    with pytest.raises(SourceError):
        fetch("org/single")
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    del hub.faults["model.safetensors"]
    assert len(open_checkpoint(fetch("org/single").folder).tensors) == 21


@pytest.mark.parametrize("name", ["org/single", "org/shards"])
def test_a_damaged_download_does_not_stay(
    hub: Hub, fetch: Resolve, name: str, tmp_path: Path
) -> None:
    broken = "model.safetensors" if name == "org/single" else "model-00002-of-00002.safetensors"
    hub.faults[broken] = ["flip"]
    with pytest.raises(SourceError, match="the download is damaged.*try again"):
        fetch(name)
    assert not list((tmp_path / "cache").rglob(broken))
    assert len(open_checkpoint(fetch(name).folder).tensors) == 21


def test_without_an_endpoint_of_its_own(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.patched(monkeypatch, tmp_path / "cache")
    source = resolve("org/single")
    assert source.revision == hub.sha("org/single")
    assert source.folder.is_relative_to(tmp_path / "cache")


def test_a_download_that_always_fails(hub: Hub, fetch: Resolve, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = [404] * 50
    with pytest.raises(LoadError):
        fetch("org/single")
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    del hub.faults["model.safetensors"]
    assert len(open_checkpoint(fetch("org/single").folder).tensors) == 21


def test_two_processes_at_once_and_a_killed_one(hub: Hub, tmp_path: Path, single: Path) -> None:
    script = "from purelm.convert.hub import resolve; print(resolve('org/single').folder)"
    environment = os.environ | hub.environment(tmp_path / "cache")
    environment["PYTHONPATH"] = str(ROOT / "src")

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    killed = start()
    while killed.poll() is None and not hub.log:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    both = [start(), start()]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = folders
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (Path(folder) / name).read_bytes() == (single / name).read_bytes()
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.full
def test_downloads_that_are_killed_at_any_moment(hub: Hub, tmp_path: Path, single: Path) -> None:
    """What stands under a file's name is that file, whenever the process dies; the last goes on."""
    script = "from purelm.convert.hub import resolve; print(resolve('org/single').folder)"
    environment = os.environ | hub.environment(tmp_path / "cache")
    environment["PYTHONPATH"] = str(ROOT / "src")
    generator, died = random.Random(0), 0
    for number in range(21):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if number < 20:
            requests = len(hub.log) + generator.randrange(12)
            while process.poll() is None and len(hub.log) <= requests:
                time.sleep(0.002)
            time.sleep(generator.random() * 0.03)
            process.kill()
        died += process.wait() != 0
        for path in (tmp_path / "cache").rglob("snapshots/*/*"):
            if path.is_file():
                assert path.read_bytes() == (single / path.name).read_bytes()
    assert died >= 5 and process.returncode == 0
    found = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= found
