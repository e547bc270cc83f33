"""Qwen3.5's text models, dense: Qwen3-Next's mixers, the delta nets' projections apart."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..hybrid import delta_net_names
from ..names import LLAMA, QK_NORMS, names
from .qwen3_next import gated_hybrid

DELTA_NET = delta_net_names(
    qkv="in_proj_qkv", gate="in_proj_z", beta="in_proj_b", decay="in_proj_a"
)
NAMES = names(LLAMA, QK_NORMS, DELTA_NET, further_layers=True)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen3_5ForCausalLM`."""
    # What published files say beside the fields that transformers reads.
    fields.expect("attn_output_gate", True)
    fields.expect("output_gate_type", "swish", "silu")
    for name in ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        fields.take(name, None)
    return gated_hybrid(fields, kv_heads=4, by_key_head=False)
