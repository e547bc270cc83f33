"""The row step of cross_entropy.py: logits become their losses and, in place, their gradient."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from .launch import jit
from .launch import language as tl

BLOCK = 4096  # logits a program reads at a time
OWN = 8  # of them that share a running maximum: a thread's own
WARPS = 8


@jit
def _row_kernel(
    p_logits,
    p_labels,
    p_weights,
    p_loss,
    vocabulary,
    ignore_index,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # loss = lse - (1 - s) z[label] - s mean(z) + Z lse^2 for z = cap * tanh(scale * logit / cap),
    # s the smoothing; then w times its gradient with respect to the logit over the logit itself:
    # w * ((1 + 2 Z lse) softmax(z) - (1 - s) onehot - s / v) * (1 - tanh^2) * scale.
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride
    i_label = tl.load(p_labels + i_row)
    counts = i_label != ignore_index
    m_label = (i_label >= 0) & (i_label < vocabulary)
    # Read before any warp can write the gradient over it: the reductions below are between.
    b_own = tl.load(p_row + i_label, mask=m_label, other=float("nan")).to(tl.float32)
    b_max = tl.full([BLOCK // OWN], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK // OWN], dtype=tl.float32)
    b_all = tl.zeros([BLOCK], dtype=tl.float32)
    for i_start in range(0, vocabulary, BLOCK):
        o = i_start + tl.arange(0, BLOCK)
        b_z = tl.load(p_row + o, mask=o < vocabulary, other=float("-inf")).to(tl.float32)
        b_z, _ = _cap(b_z * SCALE, SOFTCAP)
        if SMOOTHING > 0.0:
            b_all += tl.where(o < vocabulary, b_z, 0.0)
        b_z = tl.reshape(tl.where(o < vocabulary, b_z, float("-inf")), (BLOCK // OWN, OWN))
        b_new = tl.maximum(b_max, tl.max(b_z, axis=1))
        # Who has met no logit yet keeps a sum of zero: exp(-inf - -inf) would be NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_powers = tl.sum(tl.exp(b_z - b_shift[:, None]), axis=1)
        b_sum = b_sum * tl.exp(b_max - b_shift) + b_powers
        b_max = b_new
    b_top = tl.max(b_max, axis=0)
    b_total = tl.sum(b_sum * tl.exp(b_max - b_top), axis=0)
    b_own, _ = _cap(b_own * SCALE, SOFTCAP)
    if SMOOTHING > 0.0:
        b_away = tl.sum(b_all, axis=0) / vocabulary - b_top
        b_loss = tl.log(b_total) - (1.0 - SMOOTHING) * (b_own - b_top) - SMOOTHING * b_away
    else:
        b_loss = tl.log(b_total) - (b_own - b_top)
    if Z_LOSS > 0.0:
        b_lse = b_top + tl.log(b_total)
        b_loss += Z_LOSS * b_lse * b_lse
    tl.store(p_loss + i_row, tl.where(counts, b_loss, 0.0))
    if GRADIENT:
        b_inverse = 1.0 / b_total
        if p_weights is not None:
            b_weight = tl.load(p_weights + i_row)
        for i_start in range(0, vocabulary, BLOCK):
            o = i_start + tl.arange(0, BLOCK)
            mask = o < vocabulary
            b_z = tl.load(p_row + o, mask=mask, other=0.0).to(tl.float32)
            b_z, b_slope = _cap(b_z * SCALE, SOFTCAP)
            b_p = tl.exp(b_z - b_top) * b_inverse
            b_d = b_p
            if SMOOTHING > 0.0:
                b_d -= SMOOTHING / vocabulary
            b_d -= tl.where(o == i_label, 1.0 - SMOOTHING, 0.0)
            if Z_LOSS > 0.0:
                # Last: where a label's softmax is 1 this is all that there is.
                b_d += b_p * (2.0 * Z_LOSS * b_lse)
            b_d = b_d * b_slope * SCALE
            if p_weights is not None:
                b_d *= b_weight
            b_d = tl.where(counts, b_d, 0.0)
            tl.store(p_row + o, b_d.to(p_logits.dtype.element_ty), mask=mask)


@jit
def _cap(b_z, SOFTCAP: tl.constexpr):
    """cap * tanh(z / cap) and its slope 1 - tanh^2; without a cap z and 1."""
    b_slope = 1.0
    if SOFTCAP > 0.0:
        b_x = b_z / SOFTCAP
        # tanh from an exponential that cannot overflow; near zero, where that cancels, from its
        # series.
        b_e = tl.exp(-2.0 * tl.abs(b_x))
        b_far = (1.0 - b_e) / (1.0 + b_e)
        b_far = tl.where(b_x < 0.0, -b_far, b_far)
        b_2 = b_x * b_x
        b_series = -0.3333333333333333 + b_2 * (0.13333333333333333 - b_2 * 0.05396825396825397)
        b_z = SOFTCAP * tl.where(b_2 < 0.01, b_x + b_x * b_2 * b_series, b_far)
        b_slope = 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
    return b_z, b_slope


def row_step(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """Launch: losses [rows] of logits [rows, v], which become their gradient in place; only that
    is weighted.
    """
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    _row_kernel(
        (logits.shape[0],),
        logits,
        labels,
        token_weights,
        losses,
        logits.shape[1],
        ignore_index,
        logits.stride(0),
        SCALE=scale,
        SOFTCAP=0.0 if softcap is None else softcap,
        SMOOTHING=smoothing,
        Z_LOSS=z_loss,
        GRADIENT=gradient,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return losses


def row_step_reference(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """Plain torch for the row step."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    tanh = None if softcap is None else torch.tanh(z / softcap)
    if softcap is not None and tanh is not None:
        z = tanh * softcap
    # Not through log_softmax: exp(z - max) / sum keeps more digits than exp(z - lse).
    top = z.amax(-1, keepdim=True)
    powers = torch.exp(z - top)
    total = powers.sum(-1, keepdim=True)
    counts = labels != ignore_index
    place = torch.where(counts, labels, 0)[:, None]
    lse = total.log() + top
    losses = (total.log() - (1.0 - smoothing) * (z.gather(1, place) - top))[:, 0]
    if smoothing:
        losses -= smoothing * (z.mean(-1) - top[:, 0])
    if z_loss:
        losses += z_loss * lse[:, 0].square()
    losses = torch.where(counts, losses, 0.0)
    if gradient:
        d = powers.div_(total)
        z_part = d * (2.0 * z_loss * lse) if z_loss else None
        if smoothing:
            d -= smoothing / d.shape[-1]
        d.scatter_add_(1, place, d.new_full(place.shape, smoothing - 1.0))
        if z_part is not None:
            d += z_part
        if tanh is not None:
            d *= 1.0 - tanh.square()
        if token_weights is not None:
            d *= token_weights[:, None]
        logits.copy_(torch.where(counts[:, None], d * scale, 0.0))
    return losses
