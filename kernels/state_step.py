"""One token after a recurrent state: all of a head's rates, its update and its read in one launch.

What Mamba 2 (`ssd_reference.step`) and the gated delta rule (`delta_rule_reference.step`) do in a
dozen small ones; the state, fp32, is written in place.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from . import token_heads
from .delta_rule import EPS, delta_rule
from .delta_rule import rates as delta_rates
from .launch import ceil_div, jit, on_gpu, operator, ops, power_of_two
from .launch import language as tl
from .ssd import rates as ssd_rates
from .ssd import ssd

# Values of the state in a program.
VALUES = 4096
WARPS = 4


def _launches(state: Tensor, starts: Tensor | None, *tensors: Tensor) -> bool:
    """Whether the launch serves, which has no gradient."""
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (state, *tensors))
    if state.dtype != torch.float32 or graph or not on_gpu(state, starts, *tensors):
        return False
    if not state.is_contiguous():
        raise KernelError(f"the state has strides {state.stride()}: expected it contiguous")
    return True


def ssd_step(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    limits: tuple[float, float],
    starts: Tensor | None,
    state: Tensor,
) -> Tensor:
    """x [b, 1, h, p], raw dt [b, 1, h], b and c [b, 1, g, n], dt_bias, a_log and d [h] -> y [b, 1,
    h, p], fp32 from the reference, else in x's dtype. state [b, h, p, n] becomes the next.

    limits bound dt after its softplus; starts bool [b, 1]: rows whose state counts as zero.
    """
    if _launches(state, starts, x, dt, b, c, dt_bias, a_log, d):
        one = (t[:, 0] for t in (x, dt, b, c))
        y: Tensor = ops.ssd_step(*one, dt_bias, a_log, d, *limits, starts, state)
        return y[:, None]
    wide, decay = ssd_rates(dt, dt_bias, a_log, limits)
    y, last = ssd(x, wide, decay, b, c, d.to(wide.dtype), starts, state)
    assert last is not None
    state.copy_(last)
    return y


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    starts: Tensor | None,
    state: Tensor,
) -> Tensor:
    """q and k [b, 1, g, n], v [b, 1, h, p], raw beta and decay [b, 1, h], dt_bias and a_log [h] ->
    y [b, 1, h, p], fp32 from the reference, else in v's dtype. state [b, h, n, p] becomes the next.

    starts bool [b, 1]: rows whose state counts as zero.
    """
    if _launches(state, starts, q, k, v, beta, decay, dt_bias, a_log):
        one = (t[:, 0] for t in (q, k, v, beta, decay))
        y: Tensor = ops.delta_step(*one, dt_bias, a_log, starts, state)
        return y[:, None]
    rate, wide = delta_rates(beta, decay, dt_bias, a_log)
    y, last = delta_rule(q, k, v, rate, wide, starts, state)
    assert last is not None
    state.copy_(last)
    return y


@jit
def _softplus(b_x):
    """log(1 + exp(x)) to full relative precision, x itself above 20 as in torch."""
    b_e = tl.exp(tl.minimum(b_x, 20.0))
    b_u = 1.0 + b_e
    # The rounding of 1 + e cancels (Higham, Accuracy and Stability, sec. 1.14.1).
    b_small = tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))
    return tl.where(b_x > 20.0, b_x, b_small)


@jit
def _ssd_kernel(
    p_x, p_dt, p_b, p_c, p_bias, p_a, p_d, p_starts, p_state, p_y, low, high, heads,
    row_x, row_dt, row_b, row_c,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p, o_n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    m_p, m_n = o_p < P, o_n < N
    b_x = tl.load(p_x + i_b * row_x + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    o_g = i_h // SHARE * N + o_n
    b_b = tl.load(p_b + i_b * row_b + o_g, mask=m_n, other=0.0).to(tl.float32)
    b_c = tl.load(p_c + i_b * row_c + o_g, mask=m_n, other=0.0).to(tl.float32)
    b_dt = tl.load(p_dt + i_b * row_dt + i_h).to(tl.float32)
    b_dt = _softplus(b_dt + tl.load(p_bias + i_h).to(tl.float32))
    b_dt = tl.minimum(tl.maximum(b_dt, low), high)
    b_kept = tl.exp(-b_dt * tl.exp(tl.load(p_a + i_h).to(tl.float32)))
    if p_starts is not None:
        b_kept = tl.where(tl.load(p_starts + i_b) == 0, b_kept, 0.0)
    o = ((i_b * heads + i_h) * P + o_p)[:, None] * N + o_n[None, :]
    m = m_p[:, None] & m_n[None, :]
    b_state = tl.load(p_state + o, mask=m, other=0.0) * b_kept
    b_state += (b_x * b_dt)[:, None] * b_b[None, :]
    tl.store(p_state + o, b_state, mask=m)
    b_y = tl.sum(b_state * b_c[None, :], 1) + b_x * tl.load(p_d + i_h).to(tl.float32)
    tl.store(p_y + (i_b * heads + i_h) * P + o_p, b_y.to(p_y.dtype.element_ty), mask=m_p)


@jit
def _delta_kernel(
    p_q, p_k, p_v, p_beta, p_decay, p_bias, p_a, p_starts, p_state, p_y, heads,
    row_q, row_k, row_v, row_beta, row_decay, SCALE: tl.constexpr, ROUND: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p, o_n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    m_p, m_n = o_p < P, o_n < N
    o_g = i_h // SHARE * N + o_n
    b_q = tl.load(p_q + i_b * row_q + o_g, mask=m_n, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * row_k + o_g, mask=m_n, other=0.0).to(tl.float32)
    b_q = b_q * (tl.rsqrt(tl.sum(b_q * b_q, 0) + ROUND) * SCALE)
    b_k = b_k * tl.rsqrt(tl.sum(b_k * b_k, 0) + ROUND)
    b_v = tl.load(p_v + i_b * row_v + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_beta = tl.load(p_beta + i_b * row_beta + i_h).to(tl.float32)
    b_beta = 1.0 / (1.0 + tl.exp(-b_beta))
    b_decay = tl.load(p_decay + i_b * row_decay + i_h).to(tl.float32)
    b_decay = _softplus(b_decay + tl.load(p_bias + i_h).to(tl.float32))
    b_kept = tl.exp(-b_decay * tl.exp(tl.load(p_a + i_h).to(tl.float32)))
    if p_starts is not None:
        b_kept = tl.where(tl.load(p_starts + i_b) == 0, b_kept, 0.0)
    o = ((i_b * heads + i_h) * N + o_n)[:, None] * P + o_p[None, :]
    m = m_n[:, None] & m_p[None, :]
    b_state = tl.load(p_state + o, mask=m, other=0.0) * b_kept
    b_change = (b_v - tl.sum(b_state * b_k[:, None], 0)) * b_beta
    b_state += b_k[:, None] * b_change[None, :]
    tl.store(p_state + o, b_state, mask=m)
    b_y = tl.sum(b_state * b_q[:, None], 0)
    tl.store(p_y + (i_b * heads + i_h) * P + o_p, b_y.to(p_y.dtype.element_ty), mask=m_p)


def tile_for(p: int, n: int) -> int:
    """How many of a head's p features a program takes, each with a state of n."""
    return min(power_of_two(p), max(8, VALUES // power_of_two(n)))


def _options(p: int, n: int, share: int) -> dict[str, Any]:
    sizes = {"P": p, "N": n, "SHARE": share, "TILE": tile_for(p, n)}
    return {**sizes, "WIDTH": power_of_two(n), "num_warps": WARPS}


@operator(
    "ssd_step(Tensor x, Tensor dt, Tensor b, Tensor c, Tensor dt_bias, Tensor a_log, Tensor d,"
    " float low, float high, Tensor? starts, Tensor(a!) state) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    mutates=("state",),
)
def _launch_ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    low: float,
    high: float,
    starts: Tensor | None,
    state: Tensor,
) -> Tensor:
    rows, heads, p = x.shape
    groups, n = b.shape[1:]
    y = x.new_empty(x.shape)
    taken = token_heads.side_by_side(x, dt, b, c, lead=1)
    _ssd_kernel(
        (ceil_div(p, tile_for(p, n)), heads, rows),
        *taken, dt_bias.contiguous(), a_log.contiguous(), d.contiguous(),
        token_heads.flags(starts), state, y, low, high, heads, *(t.stride(0) for t in taken),
        **_options(p, n, heads // groups),
    )  # fmt: skip
    return y


@operator(
    "delta_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor decay, Tensor dt_bias,"
    " Tensor a_log, Tensor? starts, Tensor(a!) state) -> Tensor",
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
    mutates=("state",),
)
def _launch_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    starts: Tensor | None,
    state: Tensor,
) -> Tensor:
    rows, heads, p = v.shape
    groups, n = k.shape[1:]
    y = v.new_empty(v.shape)
    taken = token_heads.side_by_side(q, k, v, beta, decay, lead=1)
    _delta_kernel(
        (ceil_div(p, tile_for(p, n)), heads, rows),
        *taken, dt_bias.contiguous(), a_log.contiguous(), token_heads.flags(starts), state, y,
        heads,
        *(t.stride(0) for t in taken), SCALE=n**-0.5, ROUND=EPS, **_options(p, n, heads // groups),
    )  # fmt: skip
    return y
