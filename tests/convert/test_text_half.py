"""Text halves of vision-language checkpoints, against the whole models on text alone."""

import json
from pathlib import Path
from typing import Any

import bridged
import folders
import pytest
import tiny
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from purelm import FastLanguageModel
from purelm.convert.config import Config
from purelm.convert.load import load_folder
from purelm.convert.registry import family_of
from purelm.convert.text_half import SIZES, text_half
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder

TEXT: dict[str, Any] = {**tiny.SIZES, "pad_token_id": None}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
QWEN35 = {
    **tiny.DELTA_NET,
    "head_dim": 32,
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
}
# Class: its config's class, the config of the text half, that of the vision half.
WHOLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ("Gemma3Config", {**TEXT, "head_dim": 12, "sliding_window": 8}, VISION),
    "Gemma4": (
        "Gemma4Config",
        {
            **{**TEXT, "num_hidden_layers": 6, "head_dim": 12, "global_head_dim": 16},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99},
            **{"layer_types": [*tiny.MIXED, *tiny.MIXED[1:], "full_attention"]},
            **{"num_kv_shared_layers": 2, "pad_token_id": 0},
            **{"use_bidirectional_attention": "vision"},
        },
        {**VISION, "head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 16},
    ),
    "Llama4": (
        "Llama4Config",
        {**TEXT, "intermediate_size_mlp": 64, "num_local_experts": 3, "attention_chunk_size": 8},
        {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "Mistral3": ("Mistral3Config", {**TEXT, "model_type": "mistral"}, VISION),
    "Qwen2VL": ("Qwen2VLConfig", {**TEXT, "rope_parameters": MROPE}, {**QWEN, "embed_dim": 32}),
    "Qwen3VLMoe": (
        "Qwen3VLMoeConfig",
        {
            **{**TEXT, **tiny.EXPERTS, "num_experts_per_tok": 2, "head_dim": 12},
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        {**QWEN, "out_hidden_size": 48, "deepstack_visual_indexes": [0]},
    ),
    "LlavaNext": ("LlavaNextConfig", {**TEXT, "model_type": "mistral"}, VISION),
    "InternVL": ("InternVLConfig", {**TEXT, "model_type": "qwen2"}, VISION),
    "Lfm2Vl": (
        "Lfm2VlConfig",
        {
            **{**TEXT, "model_type": "lfm2", "intermediate_size": 96, "block_multiple_of": 64},
            "layer_types": ["conv", "full_attention", "conv"],
        },
        {**VISION, "num_patches": 16},
    ),
    "Llava": ("LlavaConfig", {**TEXT, "model_type": "llama"}, VISION),
    "Qwen2_5_VL": (
        "Qwen2_5_VLConfig",
        {**TEXT, "rope_parameters": MROPE},
        {**QWEN, "out_hidden_size": 48},
    ),
    "Qwen3VL": (
        "Qwen3VLConfig",
        {**TEXT, "head_dim": 12, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {**QWEN, "out_hidden_size": 48, "deepstack_visual_indexes": [0]},
    ),
    "Qwen3_5": ("Qwen3_5Config", {**TEXT, **QWEN35}, {**QWEN, "out_hidden_size": 48}),
    "Qwen3_5Moe": (
        "Qwen3_5MoeConfig",
        {
            **{**TEXT, **QWEN35, "num_experts": 6, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        },
        {**QWEN, "out_hidden_size": 48},
    ),
}


def whole(name: str, folder: Path, **fields: Any) -> Any:
    kind, text, vision = WHOLE[name]
    config = getattr(transformers, kind)(text_config={**text, **fields}, vision_config=vision)
    config._attn_implementation = "eager"
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    model = cls(config).float().eval()
    tiny.spread(model)
    model.tie_weights()
    tiny.save(model, folder)
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_a_text_half_computes_on_text_what_the_whole_does(name: str, tmp_path: Path) -> None:
    model = whole(name, tmp_path)
    options = {"quantize": None, "dtype": None, "device": torch.device("cpu")}
    with pytest.raises(ConfigError, match="text_only=True"):
        load_folder(tmp_path, **options)
    loaded = load_folder(tmp_path, text_only=True, **options)
    ids = bridged.ids()
    bridged.same_logits(
        decoder.forward(loaded.params, loaded.spec, ids), model(ids).logits.detach()
    )
    assert loaded.half is not None and "vision_config" in loaded.half
    left = sum(int(word) for word in loaded.half.split() if word.isdigit())
    assert left == len(load_file(tmp_path / "model.safetensors")) - len(loaded.checkpoint.tensors)
    assert left > 5 and not loaded.left_out


def test_other_layouts_of_the_files(tmp_path: Path) -> None:
    """Qwen2.5-VL as it was published: fields and names of both halves side by side."""
    whole("Qwen2_5_VL", tmp_path)
    options = {"quantize": None, "dtype": None, "device": torch.device("cpu"), "text_only": True}
    want = load_folder(tmp_path, **options)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    text = fields.pop("text_config")
    rope = {"type": "mrope", "mrope_section": [2, 2, 2]}
    old = {"rope_scaling": rope, "rope_theta": 1e4, "vision_token_id": 3}
    del text["rope_parameters"], text["model_type"]
    config.write_text(json.dumps({**text, **fields, **old}))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    flat = {k.replace("model.language_model.", "model."): v for k, v in tensors.items()}
    for prefix in ("model.visual.", "visual."):
        renamed = {k.replace("model.visual.", prefix): v for k, v in flat.items()}
        save_file(renamed, path, {"format": "pt"})
        loaded = load_folder(tmp_path, **options)
        assert loaded.spec == want.spec
        ids = bridged.ids()
        ours = decoder.forward(loaded.params, loaded.spec, ids)
        assert torch.equal(ours, decoder.forward(want.params, want.spec, ids))


def test_a_text_half_trains_and_is_saved_as_a_text_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_tokenizers.byte_level(base)
    whole("Gemma3", base, vocab_size=folders.VOCAB)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), text_only=True, dtype=torch.float32
    )
    assert "without" in model.report() and "vision_tower" in model.report()
    model = FastLanguageModel.get_peft_model(model, r=4)
    bridged.spread_trained(model)
    ids = bridged.ids()
    model(ids, labels=ids).loss.backward()
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(theirs).__name__ == "Gemma3ForCausalLM"
    merged = FastLanguageModel.from_pretrained(
        str(tmp_path / "merged"), load_in_4bit=False, dtype=torch.float32
    )[0]
    bridged.same_logits(theirs(ids).logits.detach(), merged(ids).logits.detach())
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "adapter"), text_only=True, dtype=torch.float32
    )
    model.eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mllama"}, "mllama.*known are gemma3"),
        ({"text_config": [1]}, "text_config is"),
        ({"text_config": {"model_type": "t5"}}, "text half.*'t5'"),
        (
            {"text_config": {"model_type": "qwen3_vl_moe_text", "norm_topk_prob": False}},
            "norm_topk_prob is False",
        ),
    ],
)
def test_wholes_that_are_not_known(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole("Mistral3", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(ConfigError, match=said):
        load_folder(tmp_path, quantize=None, dtype=None, device=torch.device("cpu"), text_only=True)


def test_files_without_a_text_half(tmp_path: Path) -> None:
    whole("Mistral3", tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if "language_model" not in k}
    save_file({k: v for k, v in kept.items() if "vision" in k}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="text half"):
        load_folder(tmp_path, quantize=None, dtype=None, device=torch.device("cpu"), text_only=True)


# Text halves of published configs, in short: what they leave out is as transformers has it.
PUBLISHED = {
    "gemma3": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
    "llava": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064},
    "mistral3": {"model_type": "mistral", "head_dim": 128, "hidden_size": 5120},
    "llama4": {"model_type": "llama4_text", "for_llm_compressor": False, "no_rope_layers": []},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", "hidden_size": 4096},
    "qwen3_vl": {"model_type": "qwen3_vl_text", "tie_word_embeddings": False},
    "qwen3_vl_moe": {"model_type": "qwen3_vl_moe_text"},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_a_text_half_leaves_out_is_its_classs_default(kind: str) -> None:
    given = PUBLISHED[kind]
    fields = {"model_type": kind, "text_config": given, "vision_config": {"hidden_size": 1}}
    half = text_half(Config(fields))
    assert half is not None and half.fields == ("vision_config",)
    spec = family_of(half.config.fields).spec(half.config.fields)
    text = transformers.AutoConfig.for_model(kind, text_config=given).text_config
    attention = spec.layers[0].attention
    assert attention is not None
    found = (spec.vocab, spec.dim, len(spec.layers), attention.heads, attention.kv_heads)
    names = [name for name in SIZES if name != "intermediate_size"]
    assert found == tuple(getattr(text, name) for name in names)
