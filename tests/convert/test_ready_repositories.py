"""`prefer_prequantized`: another repository is loaded only where it was asked for, and told."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import stored_bases
from corpus import good
from hub_server import Hub

from purelm import FastLanguageModel
from purelm.convert.ready_repositories import READY
from purelm.errors import ArgumentError, SourceError
from purelm.quant.nf4 import NF4

NAME = "meta-llama/Llama-3.2-1B"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    four = good(tmp_path / "four")
    stored_bases.write(stored_bases.FORMS["nf4_double"](), four)
    repos = {NAME: {"main": good(tmp_path / "plain")}, READY[NAME]: {"main": four}}
    repos["me/own"] = repos[NAME]
    with Hub(repos) as hub:
        yield hub.patched(monkeypatch, tmp_path / "cache")


def test_a_ready_repository(hub: Hub) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        NAME, prefer_prequantized=True, device_map="cpu", max_seq_length=None
    )
    assert {r.path.split("/resolve/")[0] for r in hub.log if "/resolve/" in r.path} == {
        f"/{READY[NAME]}"
    }
    assert f"{READY[NAME]}, in 4 bits already, instead of {NAME}" in str(model.report())
    assert isinstance(model.params["layers"][0]["attn"]["q"]["weight"], NF4)
    assert model.origin.name == READY[NAME]


def test_names_are_loaded_as_given(hub: Hub) -> None:
    FastLanguageModel.from_pretrained(NAME, device_map="cpu", max_seq_length=None)
    assert not any(READY[NAME] in request.path for request in hub.log)
    model, _ = FastLanguageModel.from_pretrained(
        "me/own", prefer_prequantized=True, device_map="cpu", max_seq_length=None
    )
    assert "no repository in 4 bits is known for me/own" in str(model.report())


def test_a_folder_of_that_name_is_the_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good(tmp_path / NAME)
    model, _ = FastLanguageModel.from_pretrained(
        NAME, prefer_prequantized=True, device_map="cpu", max_seq_length=None
    )
    assert not hub.log and model.origin.folder.samefile(tmp_path / NAME)


def test_what_goes_with_it(hub: Hub) -> None:
    for more in ({"load_in_4bit": False}, {"load_in_8bit": True}, {"full_finetuning": True}):
        with pytest.raises(ArgumentError, match="in 4 bits"):
            FastLanguageModel.from_pretrained(NAME, prefer_prequantized=True, **more)
    with pytest.raises(ArgumentError, match="no revision"):
        FastLanguageModel.from_pretrained(NAME, prefer_prequantized=True, revision="main")
    with pytest.raises(ArgumentError, match="True or False"):
        FastLanguageModel.from_pretrained(NAME, prefer_prequantized="yes")
    assert not hub.log
    with pytest.raises(SourceError):
        FastLanguageModel.from_pretrained("meta-llama/Llama-3.1-8B", prefer_prequantized=True)


def test_the_table() -> None:
    assert len({name.lower() for name in READY}) == len(READY)
    assert all(ready.endswith("bnb-4bit") and ready not in READY for ready in READY.values())
