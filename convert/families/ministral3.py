"""Ministral 3: Mistral with YaRN and queries that grow with the logarithm of their position."""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec, RopeSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA)
_POSITIONS = 262144
# What transformers takes where a config has no rope_parameters.
_ROPE = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Ministral3ForCausalLM`."""
    depth = fields.integer("num_hidden_layers")
    return dense_spec(
        fields,
        head_dim=128,
        kv_heads=8,
        max_positions=_POSITIONS,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        windows=(fields.integer_or_null("sliding_window", None),) * depth,
        ropes=(_rope(fields),) * depth,
    )


def _rope(fields: Fields) -> RopeSpec:
    given = fields.take("rope_parameters", _ROPE)
    if not isinstance(given, dict):
        raise fields.error(f"rope_parameters is {given!r:.200}, expected an object")
    inner = Fields(given, fields.file)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    inner.expect("max_position_embeddings", positions)
    beta = inner.number("llama_4_scaling_beta", above=-1.0)
    original = inner.integer("original_max_position_embeddings")
    known = {name: value for name, value in given.items() if name not in inner.taken}
    if given.get("rope_type", given.get("type", "default")) != "default":
        known["original_max_position_embeddings"] = original
    rope = rope_spec(
        Fields({"rope_parameters": known}, fields.file), head_width(fields, 128), positions, 1e4
    )
    return replace(rope, query_beta=beta, original_positions=original)
