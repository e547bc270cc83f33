"""Hunyuan's dense models: q and k normalised after the rotation, whose base may be stretched."""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec, RopeSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, with_attention
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(
    LLAMA,
    {
        "layers.*.attn.q_norm": "model.layers.*.self_attn.query_layernorm",
        "layers.*.attn.k_norm": "model.layers.*.self_attn.key_layernorm",
    },
)
_POSITIONS = 2048


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `HunYuanDenseV1ForCausalLM`."""
    fields.take("eod_token_id", None)
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        qk_norm=True,
        ropes=(_rope(fields),) * fields.integer("num_hidden_layers"),
    )
    return with_attention(made, qk_norm_after=True)


def _rope(fields: Fields) -> RopeSpec:
    """ "dynamic" with an `alpha` is no length's matter: theta * alpha ** (d / (d - 2)) throughout
    (NTK-aware scaling).
    """
    width = head_width(fields)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    given = {**_object(fields, "rope_scaling"), **_object(fields, "rope_parameters")}
    kind = given.get("rope_type", given.get("type"))
    if kind != "dynamic" or not given.get("alpha"):
        return rope_spec(fields, width, positions, 10000.0)
    alpha = Fields(given, fields.file).number("alpha")
    base = given.get("rope_theta", fields.take("rope_theta", 10000.0))
    plain = Fields({"rope_theta": base}, fields.file)
    rope = rope_spec(plain, width, positions, 10000.0)
    return replace(rope, theta=rope.theta * alpha ** (width / (width - 2)))


def _object(fields: Fields, name: str) -> dict[str, object]:
    value = fields.take(name, {})
    if not isinstance(value, dict):
        raise fields.error(f"{name} is {value!r:.200}, expected an object")
    return value
