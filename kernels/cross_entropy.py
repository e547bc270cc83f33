"""Cross entropy of a linear head whose logits exist a chunk of rows at a time, with its
gradients.

A chunk's logits are one matrix product; the row step turns them into losses and, in place, into
the gradient of the loss with respect to the product, from which two more products give the
gradients of hidden states and head.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import jit, on_gpu, once, operator, ops
from .launch import language as tl

CHUNK_BYTES = 1 << 29  # of logits in one chunk
BLOCK = 4096  # logits a program reads at a time
WARPS = 8


def chunk_rows(vocabulary: int, element_size: int) -> int:
    """Rows of a chunk: a power of two, 16 to 4096, whose logits take at most half a GiB where
    that is possible.
    """
    fits = max(1, CHUNK_BYTES // (vocabulary * element_size))
    return min(4096, max(16, 1 << (fits.bit_length() - 1)))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of the cross entropy of `hidden` [n, e] times the transpose of `weight` [v,
    e].

    labels [n] int64; rows with `ignore_index` count nothing and get no gradient. Logits are
    scaled, then soft-capped (cap * tanh(logit / cap), Gemma 2). fp32 [] (float64 for float64
    inputs). Gradients come in the same pass for whichever of hidden and weight require one. A
    label outside the vocabulary raises KernelError on the CPU; on a GPU, where looking would cost
    a synchronisation, it makes the loss NaN. `chunk` is the number of rows at a time.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise KernelError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)}: "
            "expected [n, e] and [v, e]"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise KernelError(
            f"labels {labels.dtype} {list(labels.shape)}: expected int64 [{hidden.shape[0]}]"
        )
    if hidden.dtype != weight.dtype:
        raise KernelError(f"hidden is {hidden.dtype}, weight {weight.dtype}: expected one dtype")
    if chunk is not None and chunk < 1:
        raise KernelError(f"chunk {chunk}: expected at least one row")
    launch = on_gpu(hidden, weight, labels)
    rows = chunk or chunk_rows(weight.shape[0], hidden.element_size())
    wanted = hidden.requires_grad, weight.requires_grad
    if not torch.is_grad_enabled():
        wanted = False, False
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, (ignore_index, softcap, float(scale), rows, launch), wanted
    )[0]
    return loss


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Plain torch with all logits at once, as transformers computes it."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="sum"
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in forward where they are known to be wanted, else in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, options: Any, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, dhidden, dweight = ops.linear_cross_entropy(hidden, weight, labels, *options, *wanted)
        return loss, dhidden, dweight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, labels, ctx.options, wanted = inputs
        _, dhidden, dweight = output
        ctx.set_materialize_grads(False)
        # With every wanted gradient made, nothing else needs to stay alive.
        ctx.kept = not any(wanted)
        kept = (hidden, weight, labels) if ctx.kept else (None, None, None)
        ctx.save_for_backward(dhidden, dweight, *kept)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *second: Tensor | None) -> Any:
        # The compiler, which knows first derivatives only, gives zeros here.
        if any(grad is not None for grad in second) and not torch.compiler.is_compiling():
            raise KernelError("linear_cross_entropy has first derivatives only")
        if dloss is None:
            return None, None, None, None, None
        dhidden, dweight, hidden, weight, labels = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:2])
        if ctx.kept:
            op = ops.linear_cross_entropy
            _, dhidden, dweight = once(op, hidden, weight, labels, *ctx.options, *wanted)
        return (
            _times(dhidden, dloss) if wanted[0] else None,
            _times(dweight, dloss) if wanted[1] else None,
            None,
            None,
            None,
        )


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product, with a factor (often one over a count of tokens) that is not rounded first."""
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


@jit
def _row_kernel(
    p_logits,
    p_labels,
    p_loss,
    vocabulary,
    ignore_index,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # loss = log sum exp z - z[label] for z = cap * tanh(scale * logit / cap); then the gradient
    # of the loss with respect to the logit over the logit itself: (softmax(z) - onehot) * (1 -
    # tanh^2) * scale.
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride
    i_label = tl.load(p_labels + i_row)
    counts = i_label != ignore_index
    m_label = (i_label >= 0) & (i_label < vocabulary)
    b_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_start in range(0, vocabulary, BLOCK):
        o = i_start + tl.arange(0, BLOCK)
        b_z = tl.load(p_row + o, mask=o < vocabulary, other=float("-inf")).to(tl.float32)
        b_z, _ = _cap(b_z * SCALE, SOFTCAP)
        b_z = tl.where(o < vocabulary, b_z, float("-inf"))
        b_new = tl.maximum(b_max, b_z)
        # A lane that has met no logit yet keeps its sum at zero: exp(-inf - -inf) would be NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.exp(b_z - b_shift)
        b_max = b_new
    b_top = tl.max(b_max, axis=0)
    b_total = tl.sum(b_sum * tl.exp(b_max - b_top), axis=0)
    b_own = tl.load(p_row + i_label, mask=m_label, other=float("nan")).to(tl.float32)
    b_own, _ = _cap(b_own * SCALE, SOFTCAP)
    b_loss = tl.log(b_total) - (b_own - b_top)
    tl.store(p_loss + i_row, tl.where(counts, b_loss, 0.0))
    if GRADIENT:
        for i_start in range(0, vocabulary, BLOCK):
            o = i_start + tl.arange(0, BLOCK)
            mask = o < vocabulary
            b_z = tl.load(p_row + o, mask=mask, other=0.0).to(tl.float32)
            b_z, b_slope = _cap(b_z * SCALE, SOFTCAP)
            b_d = tl.exp(b_z - b_top) / b_total - tl.where(o == i_label, 1.0, 0.0)
            b_d = tl.where(counts, b_d * b_slope * SCALE, 0.0)
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


def _row_step(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    gradient: bool,
) -> Tensor:
    """Launch: losses [rows] of logits [rows, v], which become their gradient in place."""
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    _row_kernel(
        (logits.shape[0],),
        logits,
        labels,
        losses,
        logits.shape[1],
        ignore_index,
        logits.stride(0),
        SCALE=scale,
        SOFTCAP=0.0 if softcap is None else softcap,
        GRADIENT=gradient,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return losses


def row_step_reference(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
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
    losses = torch.where(counts, (total.log() - (z.gather(1, place) - top))[:, 0], 0.0)
    if gradient:
        d = powers.div_(total)
        d.scatter_add_(1, place, d.new_full(place.shape, -1.0))
        if tanh is not None:
            d *= 1.0 - tanh.square()
        logits.copy_(torch.where(counts[:, None], d * scale, 0.0))
    return losses


@operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index,"
    " float? softcap, float scale, int chunk, bool launch, bool want_hidden, bool want_weight)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda hidden, weight, labels, ignore, cap, scale, chunk, launch, want_h, want_w: (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if want_h
        else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if want_w
        else weight.new_empty(0),
    ),
)
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    chunk: int,
    launch: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not launch:
        _check_labels(labels, ignore_index, weight.shape[0])
    step = _row_step if launch else row_step_reference
    hidden, labels = hidden.contiguous(), labels.contiguous()
    n, vocabulary = hidden.shape[0], weight.shape[0]
    chunk = max(1, min(chunk, n))
    logits_buffer = hidden.new_empty((chunk, vocabulary))
    losses = hidden.new_zeros((n,), dtype=wide)
    dhidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    dwide = weight.new_zeros(weight.shape, dtype=wide) if want_weight else None
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        rows, logits = hidden[start:stop], logits_buffer[: stop - start]
        torch.mm(rows, weight.t(), out=logits)
        losses[start:stop] = step(
            logits, labels[start:stop], ignore_index, softcap, scale, want_hidden or want_weight
        )
        if want_hidden:
            torch.mm(logits, weight, out=dhidden[start:stop])
        if dwide is not None and dwide.dtype == rows.dtype:
            dwide.addmm_(logits.t(), rows)
        elif dwide is not None:
            dwide += logits.t() @ rows
    dweight = weight.new_empty(0) if dwide is None else dwide.to(weight.dtype)
    return losses.sum(), dhidden, dweight


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise KernelError(
            f"label {int(labels[row])} in row {row}: "
            f"expected 0 to {vocabulary - 1} or {ignore_index}"
        )
