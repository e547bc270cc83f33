"""Which parity case throws which switch of a family's config: `python tests/switches.py [FAMILY]`.

A switch is a config field that a family reads. It is thrown by a case in which it has another value
than in transformers' own default config, or than in the family's first case.
"""

import sys
from contextlib import suppress
from typing import Any

import tiny
import transformers
from family_cases import CASES, FAMILIES, name_of

from purelm.convert.config_fields import Fields
from purelm.convert.registry import FAMILIES as KNOWN
from purelm.errors import ConfigError

# Fields, or fields of one family, that no parity case can throw, and why.
_OLD = "an older name: test_old_config_keys, test_family_files"
_TRAINING = "of training alone; transformers draws or adds it nowhere in evaluation"
_UNREAD = "read by no code of transformers either"
_START = "of fresh weights; checkpoints have theirs"
NOT_THROWN = {
    "rope_theta": _OLD,
    "rope_scaling": _OLD,
    "partial_rotary_factor": _OLD,
    "rotary_pct": _OLD,
    "rotary_emb_base": _OLD,
    "n_ctx": _OLD,
    "tie_embedding": _OLD,
    "initializer_range": _START,
    "attention_dropout": _TRAINING,
    "residual_dropout": _TRAINING,
    "resid_pdrop": _TRAINING,
    "attn_pdrop": _TRAINING,
    "embd_pdrop": _TRAINING,
    "classifier_dropout": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "router_jitter_noise": _TRAINING,
    "input_jitter_noise": _TRAINING,
    "aux_loss_alpha": _TRAINING,
    "seq_aux": _TRAINING,
    "num_nextn_predict_layers": "of layers behind the last, which are left out: test_mixture",
    "ep_size": _UNREAD,
    "for_llm_compressor": _UNREAD,
    "model_max_length": _UNREAD,
    "eod_token_id": _UNREAD,
    "global_head_dim": "an older name: test_gemma4",
    "num_global_key_value_heads": "an older name: test_gemma4",
    "summary_type": "of a classifier's head",
    "summary_activation": "of a classifier's head",
    "summary_use_proj": "of a classifier's head",
    "summary_proj_to_labels": "of a classifier's head",
    "summary_first_dropout": "of a classifier's head",
    "gpt2.reorder_and_upcast_attn": "the order of the same product",
    "gpt2.head_dim": "its width over its heads: it has no such field",
    "gpt2.num_key_value_heads": "as many as heads: it has no such field",
    "falcon.head_dim": "its width over its heads: it has no such field",
    "gemma.hidden_act": "early files say gelu and mean its tanh form",
    "cohere2.sliding_window_pattern": "transformers writes layer_types in its place",
    "qwen3_moe.max_window_layers": "all layers have the window, or none",
    "time_step_min": _START,
    "time_step_max": _START,
    "time_step_floor": _START,
    "time_step_rank": _START,
    "init_method": _START,
    "mamba_expand": "where mamba_d_ssm or heads and their width say the same",
    "mlp_expansion_factor": _UNREAD,
    "z_loss_coefficient": _TRAINING,
    "num_logits_to_keep": "how many logits generation asks for",
    "layers_block_type": _OLD,
    "granitemoehybrid.output_router_logits": _TRAINING,
    "granitemoehybrid.mlp_bias": _UNREAD,
    "granitemoeshared.mlp_bias": _UNREAD,
    "gpt_oss.experts_per_token": _OLD,
    "gpt_oss.initial_context_length": _UNREAD,
    "lfm2.block_ff_dim": _OLD,
    "full_attention_interval": "transformers writes layer_types in its place",
    "mamba_ssm_dtype": _UNREAD,
    "mtp_num_hidden_layers": "of layers behind the last, which are left out",
    "mtp_use_dedicated_embeddings": "of layers behind the last, which are left out",
    "lfm2.conv_use_xavier_init": _START,
    "lfm2.block_use_xavier_init": _START,
    "lfm2.block_out_init_scale": _START,
    "lfm2.block_mlp_init_scale": _START,
}


def why_not(family: str, field: str) -> str | None:
    """Why no case throws the field, or None where there is no reason."""
    return NOT_THROWN.get(f"{family}.{field}", NOT_THROWN.get(field))


def table(family: str) -> dict[str, str | None]:
    """Every field that the family reads -> the first case that throws it."""
    cases = [case for case in CASES if case[0] == family]
    configs = [_read(family, tiny.config(family, **switches)) for _, switches in cases]
    default = _read(family, type(tiny.config(family))()).raw
    read = {field for config in configs for field in config.taken - config.fixed}
    thrown: dict[str, str | None] = dict.fromkeys(sorted(read))
    for field in thrown:
        for case, config in zip(cases, configs, strict=True):
            value = config.raw.get(field)
            if value != default.get(field) or value != configs[0].raw.get(field):
                thrown[field] = name_of(case)
                break
    return thrown


def _read(family: str, config: Any) -> Fields:
    fields = Fields(config.to_dict())
    with suppress(ConfigError):  # of a default that asks for what no model has
        KNOWN[family].module.spec(fields)
    return fields


def main() -> None:
    transformers.logging.set_verbosity_error()
    for family in sys.argv[1:] or FAMILIES:
        print(f"\n{family}")
        for field, case in table(family).items():
            print(f"  {field:34} {case or why_not(family, field) or 'NOT THROWN'}")


if __name__ == "__main__":
    main()
