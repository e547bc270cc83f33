"""Gemma 4's own: fields by layer, stored tensors that nobody reads, a table for all layers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bridged
import gguf_models
import pytest
import tiny
import torch
from family_cases import MOE4
from safetensors.torch import load_file, save_file

from purelm.convert import peft_config
from purelm.convert.gguf_fields import architecture_of
from purelm.convert.gguf_file import open_gguf
from purelm.convert.gguf_model import config_fields
from purelm.convert.gguf_names import to_hf
from purelm.convert.load import load_folder
from purelm.convert.registry import family_of
from purelm.convert.resize import resized
from purelm.errors import ArgumentError, ConfigError
from purelm.nn import decode, decoder, fast_layer, host_table, layout, loss, tree
from purelm.nn.halves import WHOLE, runs_again
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE
from purelm.nn.spec import ModelSpec

OPTIONS: dict[str, Any] = {"quantize": None, "dtype": None, "device": torch.device("cpu")}


def fields_of(**fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiny.config("gemma4_text", **fields).to_json_string())
    return found


def spec_of(fields: dict[str, Any]) -> ModelSpec:
    return family_of(fields).spec(fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("gemma4_text", attention_k_eq_v=True, use_double_wide_mlp=True)
    return tiny.save(model, tmp_path_factory.mktemp("gemma4"))


def test_older_names_of_the_fields_by_layer() -> None:
    """As the first published files have them, in place of `per_layer_config`."""
    new = fields_of(attention_k_eq_v=True, num_global_key_value_heads=1)
    assert new["per_layer_config"] == {
        str(i): {"head_dim": 16, "num_key_value_heads": 1} for i in (1, 3, 4)
    }
    old = {k: v for k, v in new.items() if k != "per_layer_config"}
    old |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
    assert spec_of(old) == spec_of(new) == spec_of(old | {"per_layer_config": None})
    # Without k as v the other number of kv heads acts on nothing.
    plain = fields_of(num_global_key_value_heads=1)
    assert spec_of(old | {"attention_k_eq_v": False}) == spec_of(plain)


def test_numbers_of_layers_are_numbers() -> None:
    """transformers pads them with zeros, so that they sort."""
    fields = fields_of()
    padded = {f"{int(i):03}": own for i, own in fields["per_layer_config"].items()}
    assert spec_of(fields | {"per_layer_config": padded}) == spec_of(fields)


def test_what_is_said_by_default() -> None:
    """A config of the class's own defaults, and what its layers are."""
    sizes = {"vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216}
    sizes |= {"num_hidden_layers": 30, "num_attention_heads": 8}
    spec = spec_of({"model_type": "gemma4_text", **sizes})
    full = [layer.attention for layer in spec.layers if layer.sight[0] is None]
    assert [i for i, x in enumerate(spec.layers) if x.sight[0] is None] == [5, 11, 17, 23, 29]
    assert all((a.head_dim, a.kv_heads, a.rope.turned) == (512, 4, 64) for a in full)
    assert spec.inputs is not None and (spec.inputs.dim, spec.inputs.vocab) == (256, 262144)
    assert spec.layers[0].sight == (512, None) and spec.layers[0].attention.head_dim == 256


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4 of 5 layers.*full_attention"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers is 9"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"layer_types": [*["full_attention"] * 4, "sliding_attention"]}, "ends with sliding"),
        ({"per_layer_config": {"9": {"head_dim": 16}}}, "numbers of layers"),
        ({"per_layer_config": [16]}, "per_layer_config"),
        ({"per_layer_config": {"1": {"hidden_size": 16}}}, "hidden_size.*for layer 1"),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, "head_dim is 0"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, r"full_attention head_dim \[12, 16\]"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 3}}, "head_dim": 16}, "layer 1"),
        ({"global_head_dim": 24}, "global_head_dim and per_layer_config"),
        ({"vocab_size_per_layer_input": 50}, "vocab_size_per_layer_input 50"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"enable_moe_block": True}, "moe_intermediate_size"),
        ({**MOE4, "top_k_experts": 7}, "top_k_experts is 7, and num_experts is 6"),
        ({**MOE4, "num_experts": None}, "num_experts"),
        ({"sliding_window": None}, "sliding_window.*layer_types"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "beta": 2}}},
            "unknown fields beta",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.05}
                }
            },
            "turns 0 features",
        ),
    ],
)
def test_configs_that_no_model_has(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec_of(fields_of() | changed)


def test_layers_that_read_others_have_no_keys_of_their_own(folder: Path, tmp_path: Path) -> None:
    """Files may have them: they are left out, and written as they were in a merged model."""
    loaded = load_folder(folder, **OPTIONS)
    sources = [layer.kv_from for layer in loaded.spec.layers]
    assert sources == [None, None, None, 1, 1]
    assert [layer.lends for layer in loaded.spec.layers] == [False, True, False, False, False]
    widths = [layer.mlps[0].dim for layer in loaded.spec.layers]
    assert widths == [80, 80, 80, 160, 160]
    assert set(loaded.params["layers"][3]["attn"]) == {"q", "q_norm", "o"}
    assert set(loaded.params["layers"][1]["attn"]) == {"q", "k", "q_norm", "k_norm", "o"}
    ids = bridged.ids()
    want = decoder.forward(loaded.params, loaded.spec, ids)
    further = tmp_path / "further"
    further.mkdir()
    for path in folder.iterdir():
        (further / path.name).write_bytes(path.read_bytes())
    tensors = load_file(further / "model.safetensors")
    unread = {
        f"model.layers.3.self_attn.{name}.weight": torch.randn(shape)
        for name, shape in {"k_proj": (32, 48), "v_proj": (32, 48), "k_norm": (16,)}.items()
    }
    save_file({**tensors, **unread}, further / "model.safetensors", {"format": "pt"})
    again = load_folder(further, **OPTIONS)
    assert set(again.left_out) == set(unread)
    assert torch.equal(decoder.forward(again.params, again.spec, ids), want)
    bridged.bridge(further).save_pretrained_merged(tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in unread.items())


def test_more_rows(folder: Path) -> None:
    """The layers' table grows with the embedding, and the config says so."""
    loaded = load_folder(folder, **OPTIONS)
    ids = bridged.ids()
    before = decoder.forward(loaded.params, loaded.spec, ids)
    spec, params = resized(loaded.spec, loaded.params, loaded.config, 107)
    assert params["inputs"]["table"]["weight"].shape == (107, 40)
    after = decoder.forward(params, spec, ids)
    torch.testing.assert_close(after[..., :99], before, rtol=1e-6, atol=1e-6)
    assert decoder.forward(params, spec, ids + 8).isfinite().all()
    assert spec == family_of(loaded.config.fields).spec(loaded.config.fields)


def test_adapters_of_every_projection(folder: Path, tmp_path: Path) -> None:
    """Those of the layers' own inputs too: trained under each policy alike, saved and merged."""
    model = bridged.bridge(folder, quantize="nf4")
    model = peft_config.apply(model, r=4, target_modules="all-linear")
    trained = {name.rsplit(".", 2)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {"model.per_layer_model_projection", "model.layers.2.per_layer_input_gate"} <= trained
    bridged.spread_trained(model)
    bridged.assert_trains(model)
    want = model.eval()(bridged.ids()).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    other = bridged.bridge(folder, quantize="nf4")
    other.load_adapter(str(tmp_path / "adapter"), "again")
    other.set_adapter("again")
    assert torch.equal(other(bridged.ids()).logits.detach(), want)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shared", [0, 2])
def test_the_fast_path(
    shared: int, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k as v, v's norm, keys that layers share, each layer's own input: the gradients of plain
    autograd, dropout included; all by hand, but for layers that share keys under a mask.
    """
    base = tiny.hf_model("gemma4_text", num_kv_shared_layers=shared, attention_k_eq_v=True)
    model = bridged.bridge(tiny.save(base, tmp_path))
    why = [runs_again(layer, masked=masked) for layer in model.spec.layers]
    sharing = [layer.lends or layer.kv_from is not None for layer in model.spec.layers]
    assert [WHOLE in found for found in why] == [masked and one for one in sharing]
    assert masked or not any(why)
    model = peft_config.apply(model, r=4, target_modules="all-linear", lora_dropout=0.2)
    bridged.spread_trained(model)
    leaves, ids = tree.tensors(model.adapters), bridged.ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 1 - int(masked)
    by_hand: list[int] = []
    real = fast_layer.Layer.run

    def run(self: fast_layer.Layer, *args: Any) -> torch.Tensor:
        by_hand.append(self.index)
        return real(self, *args)

    monkeypatch.setattr(fast_layer.Layer, "run", run)

    def grads(policy: Any) -> Any:
        given = {"adapters": model.adapters, "residuals": policy, "seed": 3}
        given["layout"] = layout.from_mask(mask)
        total = loss.loss(model.params, model.spec, ids, ids, **given)
        return torch.autograd.grad(total, leaves)

    want = grads(None)
    for policy in (KEEP, RECOMPUTE, OFFLOAD):
        for a, b in zip(grads(policy), want, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    assert by_hand == 3 * [i for i, one in enumerate(sharing) if not (masked and one)]


def test_the_layers_table_on_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding is the head, and stays; the table of the layers' own inputs need not."""
    model, ids = bridged.bridge(folder), bridged.ids()
    want = model(ids).logits
    model.keep_embedding_on_host()
    (table,) = model.host_tables
    assert table is model.params["inputs"]["table"]["weight"]
    copied: list[int] = []
    real = host_table.looked_up

    def looked_up(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        copied.append(table.shape[1])
        return real(table, tokens)

    monkeypatch.setattr(host_table, "elsewhere", lambda t, tokens: t is table)
    monkeypatch.setattr(host_table, "looked_up", looked_up)
    assert torch.equal(model(ids).logits, want) and copied == [40]
    whole = bridged.bridge(folder, train_all=True)
    with pytest.raises(ArgumentError, match="every weight is trained"):
        whole.keep_embedding_on_host()
    moved = {"inputs": {"table": {"weight": table.to("meta")}}}
    assert decode.waits_for({**model.params, **moved}, model.spec) is not None
    assert decode.waits_for(model.params, model.spec) is None


def gguf_of(folder: Path, **fields: Any) -> Path:
    model = gguf_models.model_of(
        folder, "gemma4_text", adapt=False, **{**gguf_models.FAMILIES["gemma4_text"], **fields}
    )
    (path,) = model.save_pretrained_gguf(folder / "out", gguf_models.tokenizer(), "f32")
    return Path(path)


def test_a_gguf_file_cannot_say_whose_keys_others_read(tmp_path: Path) -> None:
    """llama.cpp takes the last two layers with keys of their own for one of each type."""
    with pytest.raises(ConfigError, match="layer 3 reads .* of layer 1, which .* those of layer 2"):
        gguf_of(tmp_path, layer_types=[*tiny.MIXED, "full_attention", "full_attention"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attention.sliding_window_pattern": [True] * 4}, "expected 5 booleans"),
        ({"attention.sliding_window_pattern": [1] * 5}, "expected 5 booleans"),
        ({"attention.sliding_window_pattern": None}, "expected 5 booleans"),
        ({"attention.head_count_kv": [1, 2, 3, 4, 5]}, "head_count_kv"),
        ({"attention.head_count_kv": [2, 2]}, "head_count_kv"),
        ({"feed_forward_length": [96, 64, 96, 96, 96]}, "feed_forward_length"),
        ({"feed_forward_length": [96, 96, 96, "x", 96]}, "expected 5 whole numbers"),
        ({"attention.value_length": 16}, "value_length differs from the head width 32"),
        ({"rope.dimension_count_swa": 8}, "dimension_count_swa differs from the head width 16"),
        ({"feed_forward_length": []}, r"feed_forward_length is \[\]"),
        ({"block_count": 0, "attention.sliding_window_pattern": []}, "expected 0 booleans"),
        ({"attention.shared_kv_layers": -1}, "shared_kv_layers"),
        ({"attention.key_length": "wide"}, "key_length"),
        ({"altup.num_inputs": 4}, "altup"),
    ],
)
def test_lists_of_a_gguf_file_that_no_model_has(
    changed: dict[str, Any], said: str, stored: Path
) -> None:
    found = open_gguf(stored)
    own = {f"gemma4.{name}": value for name, value in changed.items()}
    with pytest.raises(ConfigError, match=said):
        config_fields(replace(found, fields={**found.fields, **own}))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(tmp_path_factory.mktemp("gguf"))


def test_names_of_a_gguf_file() -> None:
    """Those of published files: experts' gates and other matrices may be one stack."""
    architecture = architecture_of("gemma4_text")
    assert to_hf("blk.3.ffn_gate_up_exps.weight", architecture) == (
        "model.layers.3.experts.gate_up_proj"
    )
    assert to_hf("blk.3.layer_output_scale.weight", architecture) == "model.layers.3.layer_scalar"
    assert to_hf("blk.3.ffn_down_exps.scale", architecture) == (
        "model.layers.3.router.per_expert_scale"
    )
    assert to_hf("per_layer_token_embd.weight", architecture) == (
        "model.embed_tokens_per_layer.weight"
    )
    assert to_hf("blk.3.ffn_gate_inp.bias_of", architecture) is None
