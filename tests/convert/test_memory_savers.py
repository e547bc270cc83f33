"""unsloth_tiled_mlp and offload_embedding: the same numbers in less memory."""

from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from bridged import ids

from purelm import FastLanguageModel
from purelm.errors import ArgumentError
from purelm.nn import fast_mlp, host_table, mlp


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path, tie_word_embeddings=False)
    return path


def load(folder: Path, how: str = "fast", device: str = "cpu", **arguments: Any) -> Any:
    full = {"load_in_4bit": False, "full_finetuning": True} if how == "full" else {}
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, device_map=device, **full, **arguments
    )
    if how == "full":
        return model.train()
    return FastLanguageModel.get_peft_model(
        model, r=4, use_dora=how == "dora", init_lora_weights="gaussian"
    )


def step(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(tokens, labels=tokens).loss
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("how", ["fast", "dora", "full"])
def test_tiles(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 120 tokens, 32 at a time: the whole batch's gradients, and no MLP that sees more."""
    tokens = ids(1, 3, 40)
    want = step(load(folder, how), tokens)
    model = load(folder, how, unsloth_tiled_mlp=True)
    assert model.tile == model.spec.dim < tokens.numel()
    rows: list[int] = []
    for module in (fast_mlp, mlp):
        real = module.activated

        def activated(parts: Any, *rest: Any, real: Any = real) -> torch.Tensor:
            rows.append(parts[0].numel() // parts[0].shape[-1])
            made: torch.Tensor = real(parts, *rest)
            return made

        monkeypatch.setattr(module, "activated", activated)
    found = step(model, tokens)
    assert max(rows) == model.spec.dim
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12


def test_tiles_that_are_none(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="unsloth_tiled_mlp is 'target:1GB'"):
        load(folder, unsloth_tiled_mlp="target:1GB")


def test_rows_of_a_table_on_the_host() -> None:
    g = torch.Generator().manual_seed(0)
    table, tokens = torch.randn(50, 8, generator=g), torch.tensor([[3, 49, 3], [0, 7, 3]])
    assert torch.equal(host_table.looked_up(table, tokens), table[tokens])
    assert not host_table.elsewhere(table, tokens)
    assert host_table.elsewhere(table, tokens.to("meta"))
    with pytest.raises(ArgumentError, match="trained and in host memory"):
        host_table.looked_up(table.requires_grad_(), tokens)


def test_an_embedding_on_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(1, 2, 12)
    want = step(load(folder), tokens)
    model = load(folder, offload_embedding=True)
    copied: list[int] = []
    real = host_table.looked_up

    def looked_up(*args: torch.Tensor) -> torch.Tensor:
        copied.append(len(args[1].unique()))
        return real(*args)

    monkeypatch.setattr(host_table, "elsewhere", lambda table, tokens: True)
    monkeypatch.setattr(host_table, "looked_up", looked_up)
    found = step(model.to("cpu"), tokens)
    assert copied == [len(tokens.unique())]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_an_embedding_that_is_needed_whole(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tied = tmp_path_factory.mktemp("tied")
    folders.whole(tied, tie_word_embeddings=True)
    with pytest.raises(ArgumentError, match="its head is the same table"):
        load(tied, offload_embedding=True)
    with pytest.raises(ArgumentError, match="every weight is trained"):
        load(folder, "full", offload_embedding=True)


@pytest.mark.gpu
def test_the_table_stays_on_the_host(folder: Path, tmp_path: Path) -> None:
    tokens = ids(1, 2, 12)
    want = step(load(folder, device="cuda"), tokens.cuda())
    model = load(folder, device="cuda", offload_embedding=True).to("cuda")
    assert model.device.type == "cuda"
    assert model.params["embed"]["weight"].device.type == "cpu"
    for given in (tokens, tokens.cuda()):
        for a, b in zip(step(model, given), want, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12
    model.for_inference()
    assert model.generate(tokens.cuda()[:, :5], max_new_tokens=3).shape == (2, 8)
    model.save_pretrained_merged(tmp_path / "merged", None, save_method="merged_16bit")
