"""Cross entropy of a linear head whose logits exist a chunk of rows at a time, with its
gradients.

A chunk's logits are one matrix product; the row step turns them into losses and, in place, into
the gradient of the loss with respect to the product, from which two more products give the
gradients of hidden states and head.
"""

from __future__ import annotations

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
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of the cross entropy of `hidden` [n, e] times the transpose of `weight` [v,
    e].

    labels [n] int64; rows with `ignore_index` count nothing and get no gradient. Logits are
    scaled, then soft-capped (cap * tanh(logit / cap), Gemma 2). fp32 [] (float64 for float64
    inputs). `label_smoothing`, 0 to 1, is the share of the target that is spread evenly over the
    vocabulary (arXiv 1512.00567, torch's cross_entropy); `z_loss` times the squared
    log-sum-exp of a row's logits is added to its loss (PaLM, arXiv 2204.02311, 1e-4);
    token_weights [n] fp32 (or the loss's dtype) multiplies each row's loss. Gradients come in
    the same pass for whichever of hidden and weight require one, and token_weights may too. A
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
    launch = on_gpu(hidden, weight, labels, token_weights)
    rows = chunk or chunk_rows(weight.shape[0], weight.shape[1], hidden.element_size())
    wanted = hidden.requires_grad, weight.requires_grad
    if not torch.is_grad_enabled():
        wanted = False, False
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
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
) -> Tensor:
    """Plain torch with all logits at once, as transformers computes it."""
    logits = torch.nn.functional.linear(hidden, weight)
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
        labels: Tensor,
        token_weights: Tensor | None,
        options: Any,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = hidden, weight, labels, token_weights
        loss, dhidden, dweight, losses = ops.linear_cross_entropy(*tensors, *options, *wanted)
        return loss, dhidden, dweight, losses

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, labels, token_weights, ctx.options, wanted = inputs
        _, dhidden, dweight, losses = output
        ctx.set_materialize_grads(False)
        # With every wanted gradient made, nothing else needs to stay alive.
        ctx.kept = not any(wanted)
        kept = (hidden, weight, labels, token_weights) if ctx.kept else (None,) * 4
        ctx.save_for_backward(dhidden, dweight, losses, *kept)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *second: Tensor | None) -> Any:
        # The compiler, which knows first derivatives only, gives zeros here.
        if any(grad is not None for grad in second) and not torch.compiler.is_compiling():
            raise KernelError("linear_cross_entropy has first derivatives only")
        if dloss is None:
            return (None,) * 6
        dhidden, dweight, losses, *kept = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:2])
        if ctx.kept and any(wanted):
            op = ops.linear_cross_entropy
            _, dhidden, dweight, _ = once(op, *kept, *ctx.options, *wanted)
        return (
            once(ops.wide_product, dhidden, dloss) if wanted[0] else None,
            once(ops.wide_product, dweight, dloss) if wanted[1] else None,
            None,
            losses * dloss if ctx.needs_input_grad[3] else None,
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
    hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dhidden, dweight = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for x, wanted in zip((hidden, weight), options[-2:], strict=True)
    )
    total, losses = (hidden.new_empty(shape, dtype=wide) for shape in ((), labels.shape))
    return total, dhidden, dweight, losses


@operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights,"
    " int ignore_index, float? softcap, float scale, float smoothing, float z_loss, int chunk,"
    " bool launch, bool want_hidden, bool want_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    chunk: int,
    launch: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not launch:
        _check_labels(labels, ignore_index, weight.shape[0])
    step = row_step if launch else row_step_reference
    hidden, labels = hidden.contiguous(), labels.contiguous()
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    options = ignore_index, softcap, scale, smoothing, z_loss, want_hidden or want_weight
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
        some = None if token_weights is None else token_weights[start:stop]
        losses[start:stop] = step(logits, labels[start:stop], some, *options)
        if want_hidden:
            torch.mm(logits, weight, out=dhidden[start:stop])
        if dwide is not None and dwide.dtype == rows.dtype:
            dwide.addmm_(logits.t(), rows)
        elif dwide is not None:
            dwide += logits.t() @ rows
    dweight = weight.new_empty(0) if dwide is None else dwide.to(weight.dtype)
    weighed = losses if token_weights is None else losses * token_weights
    # Many rows' sum, rounded once.
    total = weighed.sum(dtype=torch.float64).to(wide)
    return total, dhidden, dweight, losses


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise KernelError(
            f"label {int(labels[row])} in row {row}: "
            f"expected 0 to {vocabulary - 1} or {ignore_index}"
        )
