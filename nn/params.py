"""The tree of `ParamSpec`s that a `ModelSpec` implies, and what derives from it.

One description drives initialising, checking, loading, memory planning and quantization.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..errors import CheckpointError
from . import tree
from .spec import (
    AttentionSpec,
    DeltaNetSpec,
    LatentSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RecurrentSpec,
    ShortConvSpec,
)

# Where xIELU's scalars start: softplus makes them 0.8, and 0.3 above beta (arXiv 2411.13010).
XIELU = {name: math.log(math.expm1(x)) for name, x in {"alpha_p": 0.8, "alpha_n": 0.3}.items()}


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: shape, the letters of its axes, how to draw it, may it be quantized, is
    it fp32 whatever the others are.
    """

    shape: tuple[int, ...]
    axes: str
    init: Literal["normal", "zeros", "ones", "log_range"] | float = "normal"
    quantize: bool = False
    wide: bool = False


def param_specs(spec: ModelSpec) -> tree.Tree:
    """The tree of `ParamSpec`s with the structure of `params`."""
    out: dict[str, Any] = {
        "embed": {"weight": ParamSpec((spec.vocab, spec.dim), "ve")},
        "layers": [_layer(layer, spec.dim) for layer in spec.layers],
    }
    if spec.learned_positions:
        out["positions"] = {"weight": ParamSpec((spec.max_positions, spec.dim), "pe")}
    if spec.inputs is not None:
        width = len(spec.layers) * spec.inputs.dim
        out["inputs"] = {
            "table": {"weight": ParamSpec((spec.inputs.vocab, width), "vc")},
            "project": _linear(width, spec.dim, "ce", False),
            "norm": _norm(spec.inputs.norm, (spec.inputs.dim,), "c"),
        }
    if spec.norm.weight:
        out["norm"] = _norm(spec.norm, (spec.dim,), "e")
    head = {} if spec.tied else {"weight": ParamSpec((spec.vocab, spec.dim), "ve")}
    if spec.head_bias:
        head["bias"] = ParamSpec((spec.vocab,), "v", init="zeros")
    if head:
        out["head"] = head
    return out


def _layer(layer: LayerSpec, e: int) -> dict[str, Any]:
    mixers = {}
    if (a := layer.attention) is not None:
        mixers["attn"] = _attention(a, e) if a.latent is None else _latent(a, a.latent, e)
    if layer.recurrent is not None:
        mixers["recurrent"] = _recurrent(layer.recurrent, e)
    mlp = _moe(layer.mlp, e) if isinstance(layer.mlp, MoESpec) else _mlp(layer.mlp, e)
    here = {
        "attn_norm": layer.pre_norm,
        "attn_post_norm": layer.post_norm,
        "mlp_norm": layer.mlp_normed and (layer.own_norms or not layer.parallel),
        "mlp_post_norm": layer.post_norm,
    }
    norms = {name: _norm(layer.norm, (e,), "e") for name, on in here.items() if on}
    if not layer.norm.weight:
        norms = {}
    made: dict[str, Any] = {**norms, **mixers, "mlp": mlp}
    if layer.inputs is not None:
        made["inputs"] = {
            "gate": _linear(layer.inputs.dim, e, "ce", False),
            "out": _linear(e, layer.inputs.dim, "ec", False),
            "norm": _norm(layer.inputs.norm, (e,), "e"),
        }
    if layer.scaled:
        made["scale"] = ParamSpec((1,), "1", init="ones")
    return made


def _attention(a: AttentionSpec, e: int) -> dict[str, Any]:
    q, kv = a.widths
    wide = {"q": q * (1 + a.gated), "k": kv, "v": kv}
    axes = {"q": "qe", "k": "ke", "v": "ke"}
    made: dict[str, Any] = {
        name: _linear(wide[name], e, axes[name], a.qkv_bias) for name in a.projections
    }
    made["o"] = _linear(e, q, "eq", a.out_bias)
    if a.qk_norm is not None and a.qk_norm.weight:
        made["q_norm"] = _qk_norm(a.qk_norm, a, a.heads, "h")
        if "k" in a.projections:
            made["k_norm"] = _qk_norm(a.qk_norm, a, a.kv_heads, "k")
    if a.sinks:
        made["sinks"] = ParamSpec((a.heads,), "h")
    return made


def _latent(a: AttentionSpec, latent: LatentSpec, e: int) -> dict[str, Any]:
    assert a.rope is not None
    q, rank = a.heads * a.head_dim, latent.q_rank
    kv = a.heads * (a.head_dim - a.rope.dim + latent.value_dim)
    if rank is None:
        made = {"q": _linear(q, e, "qe", False)}
    else:
        made = {
            "q_a": _linear(rank, e, "re", a.qkv_bias),
            "q_a_norm": _norm(latent.norm, (rank,), "r"),
            "q_b": _linear(q, rank, "qr", False),
        }
    return {
        **made,
        "kv_a": _linear(latent.kv_rank + a.rope.dim, e, "re", a.qkv_bias),
        "kv_a_norm": _norm(latent.norm, (latent.kv_rank,), "r"),
        "kv_b": _linear(kv, latent.kv_rank, "kr", False),
        "o": _linear(e, a.heads * latent.value_dim, "ev", a.out_bias),
    }


def _recurrent(r: RecurrentSpec, e: int) -> dict[str, Any]:
    if isinstance(r, DeltaNetSpec):
        return _delta_net(r, e)
    return _mamba2(r, e) if isinstance(r, Mamba2Spec) else _short_conv(r, e)


def _mamba2(r: Mamba2Spec, e: int) -> dict[str, Any]:
    made = {
        **{name: _linear(width, e, "ce", r.in_bias) for name, width in r.inputs.items()},
        "conv": _conv(r.channels, r.kernel, r.conv_bias),
        "dt_bias": ParamSpec((r.heads,), "h", init="ones"),
        "A_log": ParamSpec((r.heads,), "h", init="log_range"),
        "D": ParamSpec((r.heads,), "h", init="ones"),
    }
    if r.norm is not None:
        made["norm"] = _norm(r.norm, (r.dim,), "c")
    made["out"] = _linear(e, r.dim, "ec", r.out_bias)
    return made


def _delta_net(r: DeltaNetSpec, e: int) -> dict[str, Any]:
    return {
        **{name: _linear(width, e, "ce", False) for name, width in r.inputs.items()},
        "conv": _conv(r.channels, r.kernel, False),
        "dt_bias": ParamSpec((r.value_heads,), "h", init="ones"),
        "A_log": ParamSpec((r.value_heads,), "h", init="log_range"),
        "norm": _norm(r.norm, (r.value_dim,), "d"),
        "out": _linear(e, r.widths[1], "ec", False),
    }


def _short_conv(r: ShortConvSpec, e: int) -> dict[str, Any]:
    return {
        **{name: _linear(width, e, "ce", r.bias) for name, width in r.inputs.items()},
        "conv": _conv(r.dim, r.kernel, r.bias),
        "out": _linear(e, r.dim, "ec", r.bias),
    }


def _conv(channels: int, kernel: int, bias: bool) -> dict[str, ParamSpec]:
    # As torch's Conv1d with a group for each channel stores it.
    made = {"weight": ParamSpec((channels, 1, kernel), "c1w")}
    if bias:
        made["bias"] = ParamSpec((channels,), "c", init="zeros")
    return made


def _mlp(mlp: MLPSpec, e: int) -> dict[str, Any]:
    made = {"gate": _linear(mlp.dim, e, "fe", mlp.bias)} if mlp.gated else {}
    made["up"] = _linear(mlp.dim, e, "fe", mlp.bias)
    made["down"] = _linear(e, mlp.dim, "ef", mlp.bias)
    if mlp.activation == "xielu":
        made["act"] = {name: ParamSpec((1,), "1", init=value) for name, value in XIELU.items()}
    return made


def _moe(moe: MoESpec, e: int) -> dict[str, Any]:
    # The experts' weights of one projection are one leaf, in which each is quantized for itself.
    router = {"weight": ParamSpec((moe.experts, e), "xe")}
    if moe.router_bias:
        router["bias"] = ParamSpec((moe.experts,), "x", init="zeros")
    if moe.choice_bias:
        router["bias"] = ParamSpec((moe.experts,), "x", init="zeros", wide=True)
    if moe.router_norm is not None:
        router["scale"] = ParamSpec((e,), "e", init="ones")
        router["expert_scale"] = ParamSpec((moe.experts,), "x", init="ones")
    made: dict[str, Any] = {"router": router}
    made["experts"] = tree.map(
        lambda p: replace(p, shape=(moe.experts, *p.shape), axes=f"x{p.axes}"), _mlp(moe.expert, e)
    )
    if moe.shared is not None:
        made["shared"] = _mlp(moe.shared, e)
    if moe.shared_gate:
        made["shared_gate"] = {"weight": ParamSpec((1, e), "1e")}
    if moe.norms is not None:
        names = ("norm", "post_norm", *(("shared_norm", "shared_post_norm") if moe.shared else ()))
        made |= {name: _norm(moe.norms, (e,), "e") for name in names}
    return made


def _linear(out: int, inp: int, axes: str, bias: bool) -> dict[str, ParamSpec]:
    made = {"weight": ParamSpec((out, inp), axes, quantize=True)}
    if bias:
        made["bias"] = ParamSpec((out,), axes[0], init="zeros")
    return made


def _norm(norm: NormSpec, shape: tuple[int, ...], axes: str) -> dict[str, ParamSpec]:
    # With an offset of 1 the stored weight is the difference from 1.
    made = {"weight": ParamSpec(shape, axes, init="zeros" if norm.offset else "ones")}
    if norm.bias:
        made["bias"] = ParamSpec(shape, axes, init="zeros")
    return made


def _qk_norm(norm: NormSpec, a: AttentionSpec, heads: int, axis: str) -> dict[str, ParamSpec]:
    if a.qk_norm_over == "head":
        return _norm(norm, (a.head_dim,), "d")
    if a.qk_norm_over == "heads":
        return _norm(norm, (heads, a.head_dim), axis + "d")
    return _norm(norm, (heads * a.head_dim,), axis)


def init(
    spec: ModelSpec,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tree.Tree:
    """Random parameters: normal(0, spec.init_std) matrices, unit norms, zero biases.

    Drawn on the generator's device in fp32, so a CPU generator gives the same values everywhere.
    """

    def draw(p: ParamSpec) -> torch.Tensor:
        if p.init == "normal":
            drawn = torch.empty(p.shape, device=generator.device)
            drawn.normal_(0.0, spec.init_std, generator=generator)
        elif p.init == "log_range":  # log 1, log 2...
            drawn = torch.arange(1.0, p.shape[0] + 1, device=generator.device).log()
        else:
            value = {"zeros": 0.0, "ones": 1.0}[p.init] if isinstance(p.init, str) else p.init
            drawn = torch.full(p.shape, value, device=generator.device)
        return drawn.to(device=device, dtype=torch.float32 if p.wide else dtype)

    return tree.map(draw, param_specs(spec))


def check(params: tree.Tree, spec: ModelSpec) -> None:
    """Raise `CheckpointError` naming the first tensors that are missing, extra or misshapen."""
    want = dict(tree.items(param_specs(spec)))
    have = dict(tree.items(params))
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    if missing or extra:
        raise CheckpointError(
            f"params do not fit the spec: missing {_some(missing)}, not wanted {_some(extra)}"
        )
    for path, p in want.items():
        shape = tuple(have[path].shape)
        if shape != p.shape:
            raise CheckpointError(
                f"found shape {shape}, expected {p.shape} ({p.axes})", tensor=path
            )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "none"


def count(spec: ModelSpec) -> int:
    """Number of parameters."""
    return sum(torch.Size(p.shape).numel() for p in tree.leaves(param_specs(spec)))
