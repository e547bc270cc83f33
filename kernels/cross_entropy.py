"""Cross entropy of a linear head whose logits exist a chunk of rows at a time, with its
gradients.

A chunk's logits are one matrix product; the row step turns them into losses and, in place, into
the gradient of the loss with respect to the product, from which two more products give the
gradients of hidden states and head. A low-rank change of the head rides on the same chunks: nothing
of the head's size is made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .cross_entropy_rows import row_step, row_step_reference
from .launch import on_gpu, once, operator, ops

CHUNK_BYTES = 1 << 29  # of logits in one chunk
# Of hidden states in one chunk: as many nearly fill a GPU with tiles of their gradient; twice as
# many are 5% faster at 4096 features and take half as much again of memory.
CHUNK_STATES = 1 << 21


def chunk_rows(vocabulary: int, features: int, element_size: int) -> int:
    """Rows of a chunk: a power of two, 16 to 4096, whose logits take at most half a GiB where
    that is possible; no more than 512 where their hidden states are `CHUNK_STATES` numbers then.
    """
    fits = max(1, CHUNK_BYTES // (vocabulary * element_size))
    enough = max(512, CHUNK_STATES // features)
    return max(16, 1 << (min(4096, fits, enough).bit_length() - 1))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of the cross entropy of `hidden` [n, e] times the transpose of `weight` [v,
    e].

    labels [n] int64; rows with `ignore_index` count nothing and get no gradient. Logits are
    scaled, then soft-capped (cap * tanh(logit / cap), Gemma 2). fp32 [] (float64 for float64
    inputs). `label_smoothing`, 0 to 1, is the share of the target that is spread evenly over the
    vocabulary (arXiv 1512.00567, torch's cross_entropy); `z_loss` times the squared
    log-sum-exp of a row's logits is added to its loss (PaLM, arXiv 2204.02311, 1e-4);
    token_weights [n] fp32 (or the loss's dtype) multiplies each row's loss. low [n, r] and b [v, r]
    add low times the transpose of b to the logits before they are scaled: with low = hidden times
    A^T a low-rank adapter of the head (arXiv 2106.09685). Gradients come in the same pass for
    whichever of hidden, weight, low and b require one, and token_weights may too. A label outside
    the vocabulary raises KernelError on the CPU; on a GPU, where looking would cost a
    synchronisation, it makes the loss NaN. `chunk` is the number of rows at a time.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise KernelError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)}: "
            "expected [n, e] and [v, e]"
        )
    _check_low_rank(hidden, weight, low, b)
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise KernelError(
            f"labels {labels.dtype} {list(labels.shape)}: expected int64 [{hidden.shape[0]}]"
        )
    if hidden.dtype != weight.dtype:
        raise KernelError(f"hidden is {hidden.dtype}, weight {weight.dtype}: expected one dtype")
    if chunk is not None and chunk < 1:
        raise KernelError(f"chunk {chunk}: expected at least one row")
    if not 0.0 <= label_smoothing <= 1.0:
        raise KernelError(f"label_smoothing {label_smoothing}: expected 0 to 1")
    if not 0.0 <= z_loss < float("inf"):
        raise KernelError(f"z_loss {z_loss}: expected a number that is not negative")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if token_weights is not None and (
        token_weights.shape != labels.shape or token_weights.dtype != wide
    ):
        raise KernelError(
            f"token_weights {token_weights.dtype} {list(token_weights.shape)}: "
            f"expected {wide} [{labels.shape[0]}]"
        )
    launch = on_gpu(hidden, weight, labels, token_weights, low, b)
    rows = chunk or chunk_rows(weight.shape[0], weight.shape[1], hidden.element_size())
    grads = torch.is_grad_enabled()
    factors = hidden, weight, low, b
    wanted = tuple(grads and x is not None and x.requires_grad for x in factors)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *factors,
        labels,
        token_weights,
        (ignore_index, softcap, float(scale), float(label_smoothing), float(z_loss), rows, launch),
        wanted,
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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """Plain torch with all logits at once, as transformers computes it."""
    logits = torch.nn.functional.linear(hidden, weight)
    if low is not None and b is not None:
        logits = logits + torch.nn.functional.linear(low, b)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    losses = torch.nn.functional.cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        squares = logits.logsumexp(-1).square()
        losses = losses + z_loss * torch.where(labels == ignore_index, 0.0, squares)
    return (losses if token_weights is None else losses * token_weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in forward where they are known to be wanted, else in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        low: Tensor | None,
        b: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        options: Any,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        tensors = hidden, weight, low, b, labels, token_weights
        made: tuple[Tensor, ...] = ops.linear_cross_entropy(*tensors, *options, *wanted)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options, wanted = inputs
        ctx.set_materialize_grads(False)
        # With every wanted gradient made, nothing else needs to stay alive.
        ctx.kept = not any(wanted)
        ctx.save_for_backward(*output[1:], *(tensors if ctx.kept else (None,) * len(tensors)))

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *second: Tensor | None) -> Any:
        # The compiler, which knows first derivatives only, gives zeros here.
        if any(grad is not None for grad in second) and not torch.compiler.is_compiling():
            raise KernelError("linear_cross_entropy has first derivatives only")
        if dloss is None:
            return (None,) * 8
        losses, *grads = ctx.saved_tensors[:5]
        wanted = tuple(ctx.needs_input_grad[:4])
        if ctx.kept and any(wanted):
            op = ops.linear_cross_entropy
            _, _, *grads = once(op, *ctx.saved_tensors[5:], *ctx.options, *wanted)
        return (
            *(
                once(ops.wide_product, grad, dloss) if want else None
                for grad, want in zip(grads, wanted, strict=True)
            ),
            None,
            losses * dloss if ctx.needs_input_grad[5] else None,
            None,
            None,
        )


@operator("wide_product(Tensor x, Tensor factor) -> Tensor", fake=lambda x, _: torch.empty_like(x))
def _wide_product(x: Tensor, factor: Tensor) -> Tensor:
    """x times a factor [] of a wider dtype (often one over a count of tokens) that is not rounded
    first; a GPU makes no wide copy of x.
    """
    return torch.mul(x, factor[None], out=torch.empty_like(x))


def _fake(
    hidden: Tensor, weight: Tensor, low: Tensor | None, b: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    labels, wide = rest[0], torch.promote_types(hidden.dtype, torch.float32)
    grads = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if wanted and x is not None
        else hidden.new_empty(0)
        for x, wanted in zip((hidden, weight, low, b), rest[-4:], strict=True)
    )
    return *(hidden.new_empty(shape, dtype=wide) for shape in ((), labels.shape)), *grads


@operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? low, Tensor? b, Tensor labels,"
    " Tensor? token_weights, int ignore_index, float? softcap, float scale, float smoothing,"
    " float z_loss, int chunk, bool launch, bool want_hidden, bool want_weight, bool want_low,"
    " bool want_b) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    low: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    chunk: int,
    launch: bool,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not launch:
        _check_labels(labels, ignore_index, weight.shape[0])
    step = row_step if launch else row_step_reference
    labels = labels.contiguous()
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    options = ignore_index, softcap, scale, smoothing, z_loss, any(wanted)
    # The logits are a sum of products x w^T.
    pairs = [(hidden.contiguous(), weight)]
    if low is not None and b is not None:
        pairs.append((low.contiguous(), b))
    dx = [torch.empty_like(x) if wanted[2 * i] else None for i, (x, _) in enumerate(pairs)]
    dw = [
        w.new_zeros(w.shape, dtype=wide) if wanted[2 * i + 1] else None
        for i, (_, w) in enumerate(pairs)
    ]
    n, vocabulary = hidden.shape[0], weight.shape[0]
    chunk = max(1, min(chunk, n))
    logits_buffer = hidden.new_empty((chunk, vocabulary))
    losses = hidden.new_zeros((n,), dtype=wide)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        logits = logits_buffer[: rows.stop - start]
        torch.mm(pairs[0][0][rows], weight.t(), out=logits)
        for x, w in pairs[1:]:
            logits.addmm_(x[rows], w.t())
        some = None if token_weights is None else token_weights[rows]
        losses[rows] = step(logits, labels[rows], some, *options)
        for (x, w), x_grad, w_grad in zip(pairs, dx, dw, strict=True):
            if x_grad is not None:
                torch.mm(logits, w, out=x_grad[rows])
            if w_grad is not None and w_grad.dtype == x.dtype:
                w_grad.addmm_(logits.t(), x[rows])
            elif w_grad is not None:
                w_grad += logits.t() @ x[rows]
    weighed = losses if token_weights is None else losses * token_weights
    # Many rows' sum, rounded once.
    total = weighed.sum(dtype=torch.float64).to(wide)
    made = [g for pair in zip(dx, dw, strict=True) for g in pair]
    made += [None] * (4 - len(made))
    return total, losses, *(hidden.new_empty(0) if g is None else g.to(hidden.dtype) for g in made)


def _check_low_rank(hidden: Tensor, weight: Tensor, low: Tensor | None, b: Tensor | None) -> None:
    if low is None and b is None:
        return
    found = [None if x is None else (x.dtype, *x.shape) for x in (low, b)]
    rank = 0 if low is None else low.shape[-1]
    want = [(hidden.dtype, hidden.shape[0], rank), (hidden.dtype, weight.shape[0], rank)]
    if found != want:
        raise KernelError(
            f"low and b are {found}: expected both, {hidden.dtype} [{hidden.shape[0]}, r] and "
            f"[{weight.shape[0]}, r]"
        )


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise KernelError(
            f"label {int(labels[row])} in row {row}: "
            f"expected 0 to {vocabulary - 1} or {ignore_index}"
        )
