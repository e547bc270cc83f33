"""Sending models to the hub, against a stand-in of its HTTP API on this machine."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from hub_upload import Uploads
from huggingface_hub import ModelCard, ModelCardData

import purelm
from purelm.convert.bridge import CausalLM
from purelm.convert.gguf_file import open_gguf
from purelm.convert.push import Pushed
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import ArgumentError, UploadError

# huggingface_hub's own call of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PROMPT = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def trained() -> tuple[CausalLM, Any]:
    """The embedded model with adapters that change it."""
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        "purelm/tiny", device_map="cpu", max_seq_length=None, dtype=torch.float32
    )
    model = purelm.FastLanguageModel.get_peft_model(model, r=4, lora_alpha=12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.05
    return model.eval(), tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # A proxy of the machine must not see what is sent.
    uploads = Uploads(tmp_path / "uploads", {"hf_good": "me"})
    with Hub({}, uploads=uploads) as hub:
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        real = socket.socket.connect

        def connect(self: Any, address: Any) -> None:
            assert address[0] == "127.0.0.1", address
            real(self, address)

        monkeypatch.setattr(socket.socket, "connect", connect)
        yield hub.patched(monkeypatch, tmp_path / "cache")


def content(hub: Any, repo: str, revision: str = "main") -> dict[str, Path]:
    folder = hub.repos[repo][revision]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def loaded(source: Any, **options: Any) -> CausalLM:
    model, _ = purelm.FastLanguageModel.from_pretrained(
        source, device_map="cpu", max_seq_length=None, dtype=torch.float32, **options
    )
    return model.eval()


def test_an_adapter_goes_there_and_comes_back(trained: Any, hub: Any) -> None:
    model, _ = trained
    done = model.push_to_hub("me/mine", token="hf_good", private=True)
    files = content(hub, "me/mine")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert "tokenizer.json" in files and "model.safetensors" not in files
    assert done.files == tuple(sorted((n, p.stat().st_size) for n, p in files.items()))
    assert done.repo_id == "me/mine" and done.url.endswith(f"me/mine/commit/{done.commit}")
    assert hub.uploads.private["me/mine"] and len(hub.uploads.commits) == 1
    asked = [r for r in hub.log if "me/mine" in r.path or "/repos/" in r.path]
    assert len(asked) > 4 and all(r.token == "hf_good" for r in asked)
    again = loaded("me/mine", token="hf_good")
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    card = ModelCard(files["README.md"].read_text("utf-8"))
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "| r | 4 |" in card.text and "| lora_alpha | 12 |" in card.text
    assert 'from_pretrained("me/mine")' in card.text


def test_a_merged_model_to_a_branch_and_to_a_pull_request(trained: Any, hub: Any) -> None:
    model, tokenizer = trained
    # Without an owner it goes to the token's account.
    done = model.push_to_hub_merged(
        "whole", tokenizer, token="hf_good", revision="v2", commit_message="Second try"
    )
    assert done.repo_id == "me/whole" and content(hub, "me/whole") == {}
    assert hub.uploads.commits[-1]["summary"] == "Second try"
    files = content(hub, "me/whole", "v2")
    assert "model.safetensors" in files and "adapter_config.json" not in files
    again = loaded("me/whole", revision="v2", token="hf_good", load_in_4bit=False)
    merged = loaded(files["model.safetensors"].parent, load_in_4bit=False)
    assert torch.equal(again(PROMPT).logits, merged(PROMPT).logits)
    asked = model.push_to_hub_merged("me/whole", tokenizer, token="hf_good", create_pr=True)
    assert asked.url.endswith("/discussions/1") and content(hub, "me/whole") == {}
    assert "model.safetensors" in content(hub, "me/whole", "refs/pr/1")


def test_gguf_files(trained: Any, hub: Any) -> None:
    model, tokenizer = trained
    model.push_to_hub_gguf("me/small", tokenizer, ["bf16", "f16"], token="hf_good")
    files = content(hub, "me/small")
    assert files.keys() == {"tiny.BF16.gguf", "tiny.F16.gguf", "README.md"}
    assert open_gguf(files["tiny.BF16.gguf"]).fields["general.architecture"] == "llama"
    card = files["README.md"].read_text("utf-8")
    assert '"tiny.BF16.gguf"' in card and "- gguf" in card


def test_a_tokenizer_alone(trained: Any, hub: Any) -> None:
    _, tokenizer = trained
    tokenizer.push_to_hub("me/words", token="hf_good")
    files = content(hub, "me/words")
    assert "tokenizer.json" in files and not {"README.md", "config.json"} & files.keys()
    again = Tokenizer.from_folder(files["tokenizer.json"].parent)
    text = "Once upon a time <|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    # Beside a model that is there, whose other files stay.
    tokenizer.push_to_hub("me/words", token="hf_good", commit_message="Again")
    assert hub.uploads.commits[-1]["summary"] == "Again"
    done = tokenizer.push_to_hub("me/words", dry_run=True)
    assert done.url is None and {name for name, _ in done.files} == files.keys()


def test_a_card_that_is_there_stays(trained: Any, hub: Any) -> None:
    model, _ = trained
    hub.repos["me/mine"] = {"main": hub.uploads.place / "given"}
    (hub.uploads.place / "given").mkdir(parents=True)
    (hub.uploads.place / "given" / "README.md").write_text("My own words")
    (hub.uploads.place / "given" / "notes.txt").write_text("kept")
    done = model.push_to_hub("me/mine", token="hf_good")
    files = content(hub, "me/mine")
    assert files["README.md"].read_text() == "My own words"
    assert "notes.txt" in files and "README.md" not in dict(done.files)


def test_the_card_names_a_base_of_the_hub_only(trained: Any, tmp_path: Path) -> None:
    from purelm.convert.model_card import model_card

    model, _ = trained
    origin = model.origin
    try:
        model.origin = replace(origin, name="owner/base-1.5", revision="a" * 40)
        card = ModelCard(model_card(model, "me/mine", "adapter", tmp_path))
        assert isinstance(card.data, ModelCardData)
        assert card.data.base_model == "owner/base-1.5"
        assert card.data.to_dict()["base_model_relation"] == "adapter"
        assert f"at {'a' * 40}" in card.text
        model.origin = replace(origin, name=str(tmp_path))
        text = model_card(model, "me/mine", "merged", tmp_path)
        assert str(tmp_path) not in text and "base_model" not in text
    finally:
        model.origin = origin


def test_a_dry_run_asks_nobody(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained

    def closed(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a socket was made")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, closed)
    for done in (
        model.push_to_hub("me/mine", dry_run=True),
        model.push_to_hub_merged("me/mine", tokenizer, dry_run=True, token=False),
        model.push_to_hub_gguf("me/mine", tokenizer, "f16", dry_run=True),
    ):
        assert isinstance(done, Pushed) and done.url is None and done.commit is None
        assert "README.md" in dict(done.files) and all(size > 0 for _, size in done.files)
    assert dict(done.files).keys() == {"README.md", "tiny.F16.gguf"}


@pytest.mark.parametrize(
    ("step", "status", "message"),
    [
        ("create", 403, r"may not write to the repository 'me/mine' \(403\)"),
        ("preupload", 404, r"or its revision does not exist or is hidden from this token \(404\)"),
        ("preupload", 403, "under your own account"),
        ("lfs", 401, r"does not know the token for the repository 'me/mine' \(401\)"),
        ("put", 403, r"\(403\)"),
        ("commit", 412, "the hub answered 412"),
    ],
)
def test_what_is_refused_leaves_the_repository(
    step: str, status: int, message: str, trained: Any, hub: Any, tmp_path: Path
) -> None:
    model, _ = trained
    (tmp_path / "saved").mkdir()
    if step != "create":
        hub.repos["me/mine"] = {"main": hub.uploads.place / "given"}
        (hub.uploads.place / "given").mkdir(parents=True)
        (hub.uploads.place / "given" / "notes.txt").write_text("kept")
    hub.uploads.refuse[step] = status
    with pytest.raises(UploadError, match=message) as caught:
        model.push_to_hub("me/mine", token="hf_good", temporary_location=str(tmp_path / "saved"))
    assert "hf_good" not in str(caught.value)
    assert not hub.uploads.commits
    if step == "create":
        assert "me/mine" not in hub.repos
    else:
        assert content(hub, "me/mine").keys() == {"notes.txt"}
    assert list((tmp_path / "saved").iterdir()) == []


def test_wrong_tokens_show_before_anything_is_saved(trained: Any, hub: Any) -> None:
    model, _ = trained
    with pytest.raises(UploadError, match="does not know the token"):
        model.push_to_hub_merged("me/mine", token="hf_bad", save_method="no such method")
    with pytest.raises(UploadError, match=r"may not write to the repository 'you/mine' \(403\)"):
        model.push_to_hub("you/mine", token="hf_good")
    with pytest.raises(ArgumentError, match="no such method"):
        model.push_to_hub_merged("me/mine", token="hf_good", save_method="no such method")
    assert hub.repos == {}


def test_no_network(trained: Any, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    model, _ = trained
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UploadError, match="could not be written: .*check the network"):
            model.push_to_hub("me/mine", token="hf_good")


def test_arguments_that_cannot_be(trained: Any, tmp_path: Path) -> None:
    model, tokenizer = trained
    for name in ("", "a/b/c", "../x", "me/", "https://huggingface.co/me/mine", 3):
        with pytest.raises(ArgumentError, match="expected 'owner/name'"):
            model.push_to_hub(name, dry_run=True)
    for options, message in (
        ({"create_pr": True, "revision": "v2"}, "leave revision out"),
        ({"token": False}, "needs one"),
        ({"token": "hf bad"}, "printable ASCII"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model.push_to_hub("me/mine", **options)
    with pytest.raises(TypeError, match="comit_message"):
        model.push_to_hub("me/mine", comit_message="x", dry_run=True)
    with pytest.raises(ArgumentError, match="expected of f32"):
        model.push_to_hub_gguf("me/mine", tokenizer, "q4_k_m", dry_run=True)
    with pytest.raises(ArgumentError, match="temporary_location is .*none', expected a folder"):
        model.push_to_hub("me/mine", dry_run=True, temporary_location=str(tmp_path / "none"))
