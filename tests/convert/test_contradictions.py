"""Config fields of every family that no model can have, alone or together: each is a ConfigError
that names them, and nothing is another error.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from any_json import ROPE, json_values
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.convert.config_fields import Fields
from purelm.convert.registry import FAMILIES
from purelm.errors import ConfigError
from purelm.nn import rope, tree
from purelm.nn.params import param_specs
from purelm.nn.spec import ModelSpec, MoESpec

# Fields that act on nothing here, so that any value will do.
NOTHING = frozenset(
    """
    attention_dropout attn_pdrop classifier_dropout embd_pdrop resid_pdrop residual_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    router_aux_loss_coef
    input_jitter_noise eod_token_id mamba_chunk_size num_logits_to_keep num_nextn_predict_layers
    z_loss_coefficient
    reorder_and_upcast_attn qwen2_moe.sliding_window exaone4.sliding_window_pattern
    llama4_text.router_jitter_noise
    """.split()
)
WRONG: dict[type, tuple[Any, ...]] = {
    int: (-3, "x", [1], True),
    float: (-7.0, "x", [1], True),
    bool: ("yes", 2.5, [1]),
    str: (3, ["silu"], "sillu"),
}
# Families whose fields are called otherwise, and what a contradiction of them needs beside.
HEADS = {"gpt2": "n_head"}
WIDTH = {"gpt2": "n_embd"}
KV_HEADS = {"falcon": "num_kv_heads", "gpt2": None}
BESIDE = {"falcon": {"new_decoder_architecture": True}}
INCOMPLETE: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({}, "factor"),
    "dynamic": ({}, "factor"),
    "llama3": ({"factor": 2.0, "high_freq_factor": 4.0}, "low_freq_factor"),
    "longrope": ({"factor": 2.0, "long_factor": [1.0]}, "short_factor"),
    "yarn": ({"factor": 0}, "factor"),
}


@cache
def _text(family: str) -> str:
    return str(tiny.config(family).to_json_string(use_diff=False))


def fields_of(family: str) -> dict[str, Any]:
    """The fields of the family's tiny config."""
    found = json.loads(_text(family))
    return {k: v for k, v in found.items() if v is not None and not k.startswith("_")}


def read(family: str) -> set[str]:
    """The fields that the family reads."""
    fields = Fields(fields_of(family))
    FAMILIES[family].module.spec(fields)
    return fields.taken


def spec_of(family: str, fields: dict[str, Any]) -> ModelSpec:
    return FAMILIES[family].spec(fields, "here/config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_checked(family: str) -> None:
    """Of the wrong type, or below zero: an error that names the field."""
    base, checked = fields_of(family), 0
    for name in sorted(read(family) - NOTHING):
        if f"{family}.{name}" in NOTHING:
            continue
        for wrong in WRONG.get(type(base.get(name)), ()):
            with pytest.raises(ConfigError) as caught:
                spec_of(family, {**base, name: wrong})
            assert name in str(caught.value), (name, wrong)
            assert "here/config.json" in str(caught.value)
            checked += 1
    assert checked >= 20


def contradictions(family: str) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """(what is wrong, fields to change, texts of which the error has all)"""
    base, known = fields_of(family), read(family)
    heads, width = HEADS.get(family, "num_attention_heads"), WIDTH.get(family, "hidden_size")
    depth = next(base[name] for name in ("num_hidden_layers", "n_layer") if name in base)
    for name in (heads, width):
        yield f"{name} zero", {name: 0}, (name,)
    if kv := KV_HEADS.get(family, "num_key_value_heads"):
        yield "kv heads do not divide", {kv: 3, **BESIDE.get(family, {})}, ("key_value_heads",)
    if "head_dim" not in base and "kv_lora_rank" not in base:
        yield "heads do not divide the width", {width: base[width] + 1}, (width, heads)
    if "layer_types" in known:
        yield "too few layer types", {"layer_types": ["x"] * (depth - 1)}, ("layer_types",)
        yield "an unknown layer type", {"layer_types": ["x"] * depth}, ("layer_types", "'x'")
        yield "layer types as a text", {"layer_types": "full_attention"}, ("layer_types",)
    windows = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
    for name, kind in windows.items():
        if name in known and "layer_types" in known:
            asked = [kind] * (depth - 1) + ["full_attention"]
            changed = {"layer_types": asked, name: None}
            if "per_layer_config" in base:
                changed |= {"per_layer_config": None}
            if "use_sliding_window" in known:
                changed |= {"use_sliding_window": True}
            yield f"{kind} without its size", changed, (name,)
    every = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((name for name in every if base.get(name)), None)
    if count is not None and "num_experts_per_tok" in known:
        more = {"num_experts_per_tok": base[count] + 1}
        # Phi-3.5-MoE knows two alone.
        named = ("num_experts_per_tok",) if family == "phimoe" else ("num_experts_per_tok", count)
        yield "more experts a token than there are", more, named
        yield "no expert a token", {"num_experts_per_tok": 0}, ("num_experts_per_tok",)
    if isinstance(base.get("rope_parameters"), dict):
        own = base["rope_parameters"]
        for kind, (given, missing) in INCOMPLETE.items():
            kept = {k: v for k, v in own.items() if k.startswith(("llama_4", "rope_theta"))}
            rotary = {**kept, "rope_type": kind, **given}
            if family == "ministral3" and kind == "linear":
                continue  # it needs original positions, which linear scaling does not have
            if "original_max_position_embeddings" not in base and kind != "linear":
                rotary["original_max_position_embeddings"] = 8
            of_types = isinstance(next(iter(own.values())), dict)
            changed = dict.fromkeys(own, rotary) if of_types else rotary
            yield f"incomplete {kind}", {"rope_parameters": changed}, (missing,)


CONTRADICTIONS = [
    pytest.param(family, changed, named, id=f"{family}: {what}")
    for family in FAMILIES
    for what, changed, named in contradictions(family)
]


@pytest.mark.parametrize(("family", "changed", "named"), CONTRADICTIONS)
def test_fields_that_contradict_each_other(
    family: str, changed: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_of(family, {**fields_of(family), **changed})
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(
    ("rotary", "said"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "rope_theta 1,"),
        ({"rope_type": "default", "rope_theta": 1e-300}, "rope_theta 1e-300"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e-310}, "no finite frequencies"),
        (
            {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 2 / 12},
            "the 2 features",
        ),
    ],
)
def test_rotary_fields_that_make_no_frequencies(rotary: dict[str, Any], said: str) -> None:
    fields = {**fields_of("llama"), "rope_parameters": {"rope_theta": 1e4, **rotary}}
    with pytest.raises(ConfigError, match=said):
        spec_of("llama", fields)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_any_json_is_a_spec_or_a_config_error(family: str, data: st.DataObject) -> None:
    """One to three fields of anything, or that are gone: never another exception, never a spec of
    nonsense.
    """
    fields = fields_of(family)
    names = st.sampled_from(sorted({*read(family), *fields, "rope_scaling", "layer_types"}))
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        value = st.just(None) | json_values
        if name in ("rope_parameters", "rope_scaling"):
            inner = st.dictionaries(st.sampled_from(ROPE), json_values, max_size=6)
            kinds = st.sampled_from(["full_attention", "sliding_attention"])
            value = inner | st.dictionaries(kinds, inner, max_size=2)
        elif isinstance(fields.get(name), list):
            value = st.permutations(fields[name]) | value
        fields[name] = data.draw(value)
    try:
        spec = spec_of(family, fields)
    except ConfigError as problem:
        assert len(str(problem)) < 3000
        return
    assert hash(spec) == hash(spec_of(family, fields))
    for leaf in tree.leaves(param_specs(spec)):
        assert all(size > 0 for size in leaf.shape)
    for a in spec.attentions():
        assert a.heads % a.kv_heads == 0
        assert a.rope is None or 0 <= a.rope.dim <= a.head_dim
        assert a.window is None or a.window > 0
        assert a.kv_from is None or spec.layers[a.kv_from].lends
    for layer in spec.layers:
        if isinstance(layer.mlp, MoESpec):
            assert 0 < layer.mlp.active <= layer.mlp.experts
    for one in spec.ropes():
        if one.dim <= 1024:
            assert rope.table(one, torch.arange(3)[None]).cos.isfinite().all()
