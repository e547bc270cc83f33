"""Seed-OSS: Llama with biases on q, k and v and heads of their own width."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `SeedOssForCausalLM` in eval mode: its published files carry the
    pretraining's dropout, which is left out of fine-tuning.
    """
    for name in ("attention_dropout", "residual_dropout"):
        fields.take(name, None)
    return dense_spec(
        fields,
        head_dim=128,
        kv_heads=8,
        max_positions=524288,
        qkv_bias=fields.flag("attention_bias", True),
        out_bias=fields.flag("attention_out_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )
