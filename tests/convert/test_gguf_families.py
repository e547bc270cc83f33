"""GGUF files of every architecture: the same logits in our reader and in llama.cpp."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bridged
import gguf_models
import pytest
import torch

import purelm
from purelm.convert.gguf_architectures import families
from purelm.convert.gguf_fields import architecture_of
from purelm.convert.gguf_file import open_gguf
from purelm.convert.gguf_model import checkpoint, config_fields
from purelm.convert.gguf_names import to_ggml
from purelm.convert.registry import FAMILIES
from purelm.errors import CheckpointError, ConfigError, SaveError
from purelm.nn import decoder
from purelm.nn.spec import DeltaNetSpec

# One of each kind of thing that differs: these are checked in the quick lane too.
_QUICK = """
    gemma3_text gemma4_text granitemoe qwen2_moe phi3 cohere2 starcoder2 olmo3
    gpt_oss glm4_moe lfm2 falcon_h1 granitemoehybrid qwen3_next
""".split()
EVERY = [
    pytest.param(family, fields, marks=[] if family in _QUICK else [pytest.mark.full])
    for family, fields in gguf_models.MODELS
]


def test_no_family_is_left_out() -> None:
    assert set(families()) == set(gguf_models.FAMILIES)


def test_a_param_without_a_place_is_not_left_out_in_silence() -> None:
    llama, names = architecture_of("llama"), FAMILIES["gpt_oss"].names
    with pytest.raises(SaveError, match=r"self_attn\.sinks has no place .* llama"):
        to_ggml("model.layers.0.self_attn.sinks", llama, names)
    assert to_ggml("model.layers.0.self_attn.rotary_emb.inv_freq", llama, names) == ()


@pytest.mark.parametrize(("family", "fields"), EVERY)
def test_a_merged_model_has_its_logits(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, family, **fields)
    want = model(bridged.ids()).logits.detach()
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    spec, params = purelm.load(path, device="cpu", dtype=torch.float32)
    # Norms around 1 are stored as 1 + w in fp32, which rounds w.
    offset = 4 if model.spec.norm.offset else 1
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want, limit=5e-6 * offset)


def llama_cpp_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """What llama.cpp makes of one row of ids [1, s]: [s, v]."""
    llama_cpp = pytest.importorskip("llama_cpp")
    wide = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, type_k=wide, type_v=wide, verbose=False, n_threads=1
    )
    theirs.eval(ids[0].tolist())
    return torch.from_numpy(theirs.scores[: ids.shape[1]].copy())


@pytest.mark.full
@pytest.mark.parametrize(("family", "fields"), gguf_models.MODELS)
def test_llama_cpp_has_the_same_logits(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = gguf_models.model_of(tmp_path, family, **fields)
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    ids = bridged.ids(rows=1, length=23)
    found = llama_cpp_logits(path, ids)
    want = model(ids).logits.detach()[0]
    off = float((found - want).abs().max() / want.abs().max())
    # llama.cpp looks its GELU up in a table of half precision, layer after layer.
    gelu = any(mlp.activation.startswith("gelu") for x in model.spec.layers for mlp in x.mlps)
    # With such an epsilon a token whose state says nearly nothing has its rounding blown up.
    delta = any(isinstance(layer.recurrent, DeltaNetSpec) for layer in model.spec.layers)
    assert off < (2**-9 if gelu else 2e-5 if delta else 5e-6)
    assert torch.equal(found.argmax(-1), want.argmax(-1))


def longrope(original: int, context: int, pairs: int) -> dict[str, object]:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": original,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
    }
    return {"rope_parameters": rope, "max_position_embeddings": context}


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_longrope(family: str, tmp_path: Path) -> None:
    """Divisors for long and for short rows, both ways; said in transformers' words again."""
    extra = {"original_max_position_embeddings": 16} if family == "phi3" else {}
    model = gguf_models.model_of(tmp_path, family, **longrope(16, 64, 8), **extra)
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    held = open_gguf(path)
    assert held.tensors["rope_factors_long.weight"].shape == (8,)
    spec, params = purelm.load(path, device="cpu", dtype=torch.float32)
    for length in (12, 23):
        ids = bridged.ids(length=length)
        bridged.same_logits(decoder.forward(params, spec, ids), model(ids).logits.detach())
    # As llama.cpp writes Phi-3's files: the kind is not named.
    fields = dict(held.fields)
    del fields[f"{family}.rope.scaling.type"]
    unnamed = replace(held, fields=MappingProxyType(fields))
    assert config_fields(unnamed) == config_fields(held)
    tensors = {n: info for n, info in held.tensors.items() if n != "rope_factors_short.weight"}
    with pytest.raises(CheckpointError, match="rope_factors_short"):
        config_fields(replace(held, tensors=MappingProxyType(tensors)))


@pytest.mark.full
@pytest.mark.parametrize("original", [16, 512])
def test_llama_cpp_has_the_same_longrope(original: int, tmp_path: Path) -> None:
    """It takes the long divisors where its context is longer than the original one."""
    pytest.importorskip("llama_cpp")
    model = gguf_models.model_of(
        tmp_path, "phi3", original_max_position_embeddings=original, **longrope(original, 2048, 8)
    )
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    ids = bridged.ids(rows=1, length=23)
    found = llama_cpp_logits(path, ids)
    bridged.same_logits(found, model(ids).logits.detach()[0])


def test_latent_attention_needs_both_stacks(tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, "deepseek_v3", **gguf_models.FAMILIES["deepseek_v3"])
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    held = open_gguf(path)
    assert held.tensors["blk.0.attn_k_b.weight"].shape == (4, 64, 12)
    assert held.tensors["blk.0.attn_v_b.weight"].shape == (4, 16, 64)
    tensors = {n: info for n, info in held.tensors.items() if n != "blk.0.attn_v_b.weight"}
    with pytest.raises(CheckpointError, match="the other stack is missing"):
        checkpoint(replace(held, tensors=MappingProxyType(tensors)))


def test_windows_by_layer_that_llama_cpp_takes_from_the_depth_are_refused(tmp_path: Path) -> None:
    """Of EXAONE 4 with windows, whose other layers have no positions."""
    fields = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = gguf_models.model_of(tmp_path, "exaone4", **fields)
    with pytest.raises(ConfigError, match="a GGUF file cannot express this model"):
        model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    assert not (tmp_path / "out").exists()
