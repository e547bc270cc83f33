"""Configs: HF's attributes over the very fields of a file, and specs that cover all or refuse."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from purelm.convert.config import Config
from purelm.convert.registry import FAMILIES, family_of
from purelm.errors import ConfigError
from purelm.nn.spec import ModelSpec

FAMILY_NAMES = ["llama", "mistral", "qwen2", "qwen3"]


def fields_of(family: str, **fields: Any) -> dict[str, Any]:
    found = json.loads(tiny.config(family, **fields).to_json_string(use_diff=False))
    return {k: v for k, v in found.items() if v is not None and not k.startswith("_")}


def spec_of(fields: dict[str, Any]) -> ModelSpec:
    return family_of(fields).spec(fields)


# The object that a model carries.


def test_attributes_are_fields() -> None:
    config = Config({"model_type": "llama", "hidden_size": 48, "own": {"x": [1]}}, "somewhere")
    assert (config.model_type, config.hidden_size, config.own) == ("llama", 48, {"x": [1]})
    assert "hidden_size" in config and "pad_token_id" not in config
    assert config.pad_token_id is None and config.use_cache and not config.is_encoder_decoder
    assert config.get("nothing") is None and config.get("nothing", 3) == 3
    assert getattr(config, "nothing", 5) == 5
    with pytest.raises(AttributeError, match="nothing"):
        config.nothing  # noqa: B018
    config.vocab_size = 7
    assert config.to_dict()["vocab_size"] == 7 and config._name_or_path == "somewhere"
    config.name_or_path = "elsewhere"
    assert "name_or_path" not in config.to_dict() and config.get_text_config() is config


def test_nothing_is_shared() -> None:
    given = {"model_type": "llama", "own": {"x": [1]}}
    config = Config(given)
    given["own"]["x"].append(2)
    config.to_dict()["own"]["x"].append(3)
    other = copy.deepcopy(config)
    other.own["x"].append(4)
    assert config.own == {"x": [1]} and other != config
    assert pickle.loads(pickle.dumps(config)) == config


def test_private_keys_of_a_file_are_dropped() -> None:
    """transformers acts on some of them; here they are nobody's."""
    config = Config({"model_type": "llama", "_attn_implementation_internal": "x", "__class__": "y"})
    assert config.to_dict() == {"model_type": "llama"} and type(config) is Config


@pytest.mark.parametrize("name", ["fields", "update", "to_dict", "get", "save_pretrained"])
def test_a_field_with_a_methods_name(name: str) -> None:
    config = Config({"model_type": "llama", name: 3})
    assert config.to_dict() == {"model_type": "llama", name: 3}
    assert copy.deepcopy(config) == config and json.loads(config.to_json_string())[name] == 3


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_transformers_reads_what_we_write(family: str, tmp_path: Path) -> None:
    theirs = tiny.config(family, tie_word_embeddings=True, rms_norm_eps=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    config = Config.from_folder(tmp_path / "theirs")
    config.own = "gr\u00fc\u00df"
    config.save_pretrained(tmp_path / "ours")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert again.own == "gr\u00fc\u00df"
    delattr(again, "own")
    theirs.save_pretrained(tmp_path / "theirs")
    want = transformers.AutoConfig.from_pretrained(tmp_path / "theirs").to_dict()
    ignored = {"_name_or_path": "", "transformers_version": ""}
    assert again.to_dict() | ignored == want | ignored
    assert Config.from_folder(tmp_path / "ours") == config


# Specs out of fields.


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_field_of_transformers_default_is_covered(family: str) -> None:
    spec = spec_of(fields_of(family))
    assert (spec.vocab, spec.dim, len(spec.layers)) == (99, 48, 3)


def test_the_specs_of_equal_configs_are_equal() -> None:
    one, two = spec_of(fields_of("qwen3")), spec_of(fields_of("qwen3"))
    assert one == two and hash(one) == hash(two)
    assert one != spec_of(fields_of("qwen3", rms_norm_eps=1e-3))


UNKNOWN = {
    "attention_multiplier": 0.5,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "residual_multiplier": 0.2,
    "num_experts": 8,
    "partial_rotary": 0.5,
    "rope_interleaved": True,
    "attention_dropout": 0.1,
    "no_rope_layers": [1, 0, 1],
    "use_parallel_residual": True,
    "alibi": True,
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_field_that_could_change_the_math(family: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}={UNKNOWN[name]!r}".replace("[", r"\[")):
        spec_of(fields_of(family) | {name: UNKNOWN[name]})


WRONG: list[tuple[str, Any, str]] = [
    ("hidden_size", 0, "at least 1"),
    ("hidden_size", True, "integer"),
    ("hidden_size", 48.0, "integer"),
    ("hidden_size", None, "has no 'hidden_size'"),
    ("num_hidden_layers", 10**9, "at most"),
    ("head_dim", 10**400, "head_dim is 1000.*at most"),
    ("vocab_size", 2**31, "at most"),
    ("num_attention_heads", 5, "multiple"),
    ("rms_norm_eps", 10**400, "rms_norm_eps"),
    ("rms_norm_eps", "1e-5", "number"),
    ("rms_norm_eps", False, "number"),
    ("hidden_act", "sillu", "'sillu', expected one of silu"),
    ("hidden_act", ["silu"], "hidden_act"),
    ("tie_word_embeddings", 1, "true or false"),
    ("rope_parameters", "linear", "rope_parameters"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}, "factor"),
    ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "'spiral'"),
    ("rope_parameters", {"rope_type": ["yarn"], "rope_theta": 1e4}, "rope type"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, "factor"),
    ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast"),
    ("rope_theta", 777.0, "rope_theta stands twice"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "contradict"),
]


@pytest.mark.parametrize(("name", "value", "match"), WRONG, ids=lambda x: str(x)[:20])
def test_wrong_values(name: str, value: Any, match: str) -> None:
    fields = fields_of("llama") | {name: value}
    with pytest.raises(ConfigError, match=match):
        family_of(fields, "here/config.json").spec(fields, "here/config.json")


def test_messages_stay_short() -> None:
    many = {f"field_{i}" + "x" * 1000: ["x" * 1000] for i in range(1000)}
    for more in (many, {"hidden_act": "x" * 10**6}, {"hidden_size": ["x" * 10**6]}):
        with pytest.raises(ConfigError) as caught:
            spec_of(fields_of("llama") | more)
        assert len(str(caught.value)) < 2000


def test_families_are_named() -> None:
    for model_type in (None, "lama", 3, ["llama"], {}):
        with pytest.raises(ConfigError) as caught:
            family_of({"model_type": model_type}, "here/config.json")
        assert "here/config.json" in str(caught.value)
        assert model_type is None or ", ".join(FAMILIES) in str(caught.value)
