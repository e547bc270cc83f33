"""The launches of `delta_scan`, forward and backward, and the differentiable function of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import delta_scan, ssd_scan, token_heads
from .launch import apply, ceil_div, once, operator, ops, power_of_two

# Tokens of a chunk: solving grows with it, what is kept between chunks with its inverse.
CHUNK = 64
# The widest keys and values of the launches, whose tiles hold a chunk of a whole head.
WIDEST = 128


class Config(NamedTuple):
    """A tile of a head's values, warps, and loads in flight."""

    p: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    solve: Config
    states: Config
    out: Config
    local: Config
    pulls: Config
    dq: Config
    dk: Config


def configs_for(p: int) -> Configs:
    """For values of p features."""
    wide = max(16, power_of_two(p))
    part, slice_ = Config(min(wide, 64), 4, 2), Config(min(wide, 32), 8, 2)
    return Configs(
        solve=Config(wide, 4, 1),
        states=part,
        out=Config(wide, 8, 2),
        local=Config(wide, 8, 1),
        pulls=part,
        dq=slice_,
        dk=slice_,
    )


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`delta_rule_reference.scan` with products in v's dtype, which y has, and fp32 sums.

    Neither the state before nor the last has a gradient.
    """
    y, last, _ = apply(_DeltaRule, q, k, v, beta, decay, starts, before)
    return y, last


class _DeltaRule(torch.autograd.Function):
    """y, the last state and each chunk's T, which have no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor,
        starts: Tensor | None,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, last, t = ops.delta_rule(q, k, v, beta, decay, starts, before)
        return y, last, t

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        return *once(ops.delta_rule_backward, dy, *ctx.saved_tensors), None, None


def _options(k: Tensor, v: Tensor, config: Config, *, width: bool) -> dict[str, Any]:
    n = k.shape[3]
    deep = max(16, power_of_two(n))
    return {
        "P": v.shape[3],
        "N": n,
        "SHARE": v.shape[2] // k.shape[2],
        "CHUNK": CHUNK,
        "TILE_P": config.p,
        **({"WIDTH": deep} if width else {"TILE_N": min(64, deep)}),
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _states(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    flags: Tensor | None,
    t: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """The states [b, chunks, h, p, n] before each chunk and u [b, s, h, p], in v's dtype."""
    rows, s, heads, p = v.shape
    states, u = v.new_empty((*t.shape[:3], p, k.shape[3])), v.new_empty(v.shape)
    delta_scan._states_kernel(
        (ceil_div(p, config.p), heads, rows),
        k, v, beta, decay, flags, t, first, states, u, last, s, heads, *token_heads.steps(k, v),
        **_options(k, v, config, width=True),
    )  # fmt: skip
    return states, u


def _made(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, s, heads, p = v.shape
    last = beta.new_empty((rows, heads, k.shape[3], p))
    return v.new_empty(v.shape), last, v.new_empty((rows, ceil_div(s, CHUNK), heads, CHUNK, CHUNK))


@operator(
    "delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor decay, Tensor? starts,"
    " Tensor? before) -> (Tensor, Tensor, Tensor)",
    fake=_made,
)
def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, s, heads, p = v.shape
    y, last, t = _made(q, k, v, beta)
    q, k, v = token_heads.side_by_side(q, k, v)
    beta, decay, flags = beta.contiguous(), decay.contiguous(), token_heads.flags(starts)
    configs, chunks = configs_for(p), t.shape[1]
    options = _options(k, v, configs.solve, width=False)
    del options["P"], options["TILE_P"]
    delta_scan._solve_kernel(
        (heads, chunks, rows), k, beta, decay, flags, t, s, heads, *token_heads.steps(k), **options
    )
    first = None if before is None else before.contiguous()
    states, u = _states(k, v, beta, decay, flags, t, first, last, configs.states)
    ssd_scan._out_kernel(
        (heads, chunks, rows),
        u, k, q, decay, None, None, flags, states, y, s, heads, *token_heads.steps(u, k, q),
        **_options(k, v, configs.out, width=False),
    )  # fmt: skip
    return y, last, t


def _gradients(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


@operator(
    "delta_rule_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor decay,"
    " Tensor? starts, Tensor? before, Tensor t) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def _launch_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
    t: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, s, heads, p = v.shape
    dq, dk, dv, dbeta, ddecay = _gradients(dy, q, k, v, beta, decay)
    q, k, v = token_heads.side_by_side(q, k, v)
    dy, beta, decay, flags = (
        dy.contiguous(),
        beta.contiguous(),
        decay.contiguous(),
        token_heads.flags(starts),
    )
    first = None if before is None else before.contiguous()
    configs, chunks, groups = configs_for(p), t.shape[1], k.shape[2]
    states, u = _states(k, v, beta, decay, flags, t, first, None, configs.states)
    du, dr, pulls = torch.empty_like(u), torch.empty_like(u), torch.empty_like(states)
    sizes = (s, heads, *token_heads.steps(q, k))
    delta_scan._local_kernel(
        (heads, chunks, rows), dy, q, k, decay, flags, du, *sizes,
        **_options(k, v, configs.local, width=False),
    )  # fmt: skip
    delta_scan._pulls_kernel(
        (ceil_div(p, configs.pulls.p), heads, rows),
        dy, du, q, k, beta, decay, flags, t, pulls, dr, *sizes,
        **_options(k, v, configs.pulls, width=True),
    )  # fmt: skip
    dsum = torch.empty_like(decay)
    delta_scan._dq_kernel(
        (groups, chunks, rows), dy, u, q, k, decay, flags, states, dq, dsum, *sizes,
        **_options(k, v, configs.dq, width=True),
    )  # fmt: skip
    delta_scan._dk_kernel(
        (groups, chunks, rows),
        dy, dr, u, q, k, v, beta, decay, flags, states, pulls, dsum, dk, dv, dbeta, ddecay,
        *sizes, *token_heads.steps(v), **_options(k, v, configs.dk, width=True),
    )  # fmt: skip
    return dq, dk, dv, dbeta, ddecay
