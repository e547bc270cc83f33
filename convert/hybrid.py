"""Models of which some layers have another mixer in place of attention, or beside it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..nn.spec import DeltaNetSpec, Mamba2Spec, ModelSpec, NormSpec, RecurrentSpec
from .config_fields import Fields
from .dense import ACTIVATIONS

_INFINITY = {"__float__": "Infinity"}


def with_recurrent(spec: ModelSpec, recurrent: RecurrentSpec, where: Sequence[bool]) -> ModelSpec:
    """The spec with `recurrent` in place of attention in the layers for which `where` is true."""
    layers = (
        replace(layer, attention=None, recurrent=recurrent) if here else layer
        for layer, here in zip(spec.layers, where, strict=True)
    )
    return replace(spec, layers=tuple(layers))


def mamba2_names(block: str) -> dict[str, str]:
    """The names of a Mamba 2 mixer in the module `block` of a layer."""
    module = f"model.layers.*.{block}"
    return {
        "layers.*.recurrent": module,
        "layers.*.recurrent.in": f"{module}.in_proj",
        "layers.*.recurrent.conv": f"{module}.conv1d",
        "layers.*.recurrent.norm": f"{module}.norm",
        "layers.*.recurrent.out": f"{module}.out_proj",
    }


def mamba2_spec(fields: Fields, dim: int, *, out_bias: bool, **others: Any) -> Mamba2Spec:
    """A mixer of `dim` features out of the fields that begin with mamba_; `others` as in its spec.

    Raises ConfigError where heads, their width and groups do not make `dim`.
    """
    heads = fields.integer("mamba_n_heads", 128)
    groups = fields.integer("mamba_n_groups", 1)
    width = fields.take("mamba_d_head", "auto")
    if width == "auto" and dim % heads == 0:
        width = dim // heads
    if type(width) is not int or width * heads != dim:
        raise fields.error(
            f"mamba_n_heads {heads} of mamba_d_head {width!r:.40} do not make the mixer's {dim}"
        )
    if heads % groups:
        raise fields.error(f"mamba_n_heads {heads} is no multiple of mamba_n_groups {groups}")
    # How long the chunks of a scan are, and where training began: nothing of it changes the math.
    for name in ("mamba_chunk_size", "time_step_min", "time_step_max", "time_step_floor"):
        fields.take(name, None)
    fields.take("time_step_rank", None)
    return Mamba2Spec(
        heads=heads,
        head_dim=width,
        groups=groups,
        state=fields.integer("mamba_d_state", 256),
        kernel=fields.integer("mamba_d_conv", 4),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        in_bias=fields.flag("mamba_proj_bias", False),
        conv_bias=fields.flag("mamba_conv_bias", True),
        out_bias=out_bias,
        limits=_limits(fields),
        **others,
    )


def delta_net_names(**inputs: str) -> dict[str, str]:
    """The names of a gated delta net; `inputs` are those of the projections of what goes in."""
    module = "model.layers.*.linear_attn"
    return {
        "layers.*.recurrent": module,
        "layers.*.recurrent.conv": f"{module}.conv1d",
        "layers.*.recurrent.norm": f"{module}.norm",
        "layers.*.recurrent.out": f"{module}.out_proj",
        **{f"layers.*.recurrent.{ours}": f"{module}.{theirs}" for ours, theirs in inputs.items()},
    }


def delta_net_spec(fields: Fields, *, by_key_head: bool) -> DeltaNetSpec:
    """A gated delta net out of the fields that begin with linear_.

    Raises ConfigError where heads of values are no multiple of those of keys.
    """
    keys = fields.integer("linear_num_key_heads", 16)
    values = fields.integer("linear_num_value_heads", 32)
    if values % keys:
        raise fields.error(
            f"linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}"
        )
    return DeltaNetSpec(
        key_heads=keys,
        value_heads=values,
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_dim=fields.integer("linear_value_head_dim", 128),
        kernel=fields.integer("linear_conv_kernel_dim", 4),
        norm=NormSpec(fields.number("rms_norm_eps", 1e-6)),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        by_key_head=by_key_head,
    )


def linear_layers(fields: Fields) -> list[bool]:
    """Which layers have no attention: by `layer_types`, else all but each
    `full_attention_interval`-th.
    """
    depth = fields.integer("num_hidden_layers")
    every = fields.integer("full_attention_interval", 4)
    types = fields.texts("layer_types", depth, ("linear_attention", "full_attention"))
    if types is None:
        return [(i + 1) % every != 0 for i in range(depth)]
    return [kind == "linear_attention" for kind in types]


def _limits(fields: Fields) -> tuple[float, float]:
    """`time_step_limit`; transformers 5 writes infinity as an object."""
    found = fields.take("time_step_limit", [0.0, _INFINITY])
    if not isinstance(found, list) or len(found) != 2:
        raise fields.error(f"time_step_limit is {found!r:.100}, expected two numbers")
    low = Fields({"time_step_limit": found[0]}, fields.file).number("time_step_limit", above=-1.0)
    if found[1] in (_INFINITY, math.inf):
        return low, math.inf
    high = Fields({"time_step_limit": found[1]}, fields.file).number("time_step_limit", above=low)
    return low, high
