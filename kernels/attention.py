"""Causal attention forward and backward as two functions, over torch's own fused backends.

softmax(scale q k^T) v with grouped heads: q [b, s, h, d], k and v [b, s, k, d]. Packed rows
([1, t, ...]) are cut into documents by `cu_seqlens`; with a `window`, key j is visible from query i
when 0 <= i - j < window. The statistics are fp32 in every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import apply

aten = torch.ops.aten

Backend = Literal["cudnn", "flash", "flash_cpu", "reference"]


class Documents(NamedTuple):
    """Documents of a packed row: token offsets cu_seqlens int32 [n + 1] and the longest length."""

    cu_seqlens: Tensor
    longest: int


def backend_for(
    q: Tensor, documents: Documents | None = None, window: int | None = None
) -> Backend:
    """Which backend runs queries like `q` [b, s, h, d]: a pure function of device, dtype, shape.

    cuDNN for dense rows on GPUs of compute capability 9 and above; FlashAttention-2 for packed
    rows, windows and older GPUs; torch's fused CPU kernel, which has neither; else the plain-torch
    reference, which also serves fp32 on GPUs.
    """
    plain = documents is None and window is None
    head_dim = q.shape[-1]
    if q.is_cuda:
        if q.dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
            return "reference"
        major = torch.cuda.get_device_capability(q.device)[0]
        if major >= 9 and plain and head_dim <= 128:
            return "cudnn"
        return "flash" if major >= 8 else "reference"
    if q.device.type == "cpu" and plain:
        return "flash_cpu"
    return "reference"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
) -> Tensor:
    """[b, s, h, d], differentiable; under torch.vmap the plain-torch reference runs."""
    cu_seqlens, longest = documents or (None, 0)
    out: Tensor = apply(_Attention, q, k, v, scale, cu_seqlens, longest, window)[0]
    return out


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [b, s, h, d], log-sum-exp [b, h, s] fp32) in plain differentiable operations."""
    b, s, h, d = q.shape
    groups = h // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(_wide(q.dtype)) * scale
    scores = scores.masked_fill(~_seen(s, documents, window, q.device), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _seen(s: int, documents: Documents | None, window: int | None, device: torch.device) -> Tensor:
    index = torch.arange(s, device=device)
    seen = index[None, :] <= index[:, None]
    if window is not None:
        seen = seen & (index[:, None] - index[None, :] < window)
    if documents is None:
        return seen
    document = torch.bucketize(index, documents.cu_seqlens[1:].long(), right=True)
    return seen & (document[None, :] == document[:, None])


class Saved(NamedTuple):
    """What a backward needs beside q, k, v: the output, its log-sum-exp, the backend's own."""

    out: Tensor
    lse: Tensor
    rest: tuple[Any, ...]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
) -> Saved:
    """The output [b, s, h, d] with what `attention_backward` needs; builds no graph.

    Raises KernelError for shapes that do not belong together.
    """
    if q.shape[2] % k.shape[2] or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise KernelError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together: "
            "expected [b, s, h, d] and twice [b, s, k, d] with h a multiple of k"
        )
    window = _limiting(window, q)
    backend = backend_for(q, documents, window)
    if backend == "reference":
        out, lse = attention_reference(q, k, v, scale=scale, documents=documents, window=window)
        return Saved(out, lse, ())
    if backend == "flash":
        rows, extent, left = _flash_arguments(q, documents, window)
        out, lse, *rest = aten._flash_attention_forward(
            *(rows(x) for x in (q, k, v)), *extent, 0.0, True, False, scale=scale, **left
        )
        return Saved(out.view(q.shape), lse, tuple(rest[:2]))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "cudnn":
        out, lse, *rest = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
        return Saved(out.transpose(1, 2), lse, tuple(rest[:6]))
    k, v = _widened(k, q), _widened(v, q)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return Saved(out.transpose(1, 2), lse, ())


def _limiting(window: int | None, q: Tensor) -> int | None:
    """None where the window hides nothing of rows as long as q's."""
    return None if window is None or window >= q.shape[1] else window


def _flash_arguments(
    q: Tensor, documents: Documents | None, window: int | None
) -> tuple[Callable[[Tensor], Tensor], tuple[Any, ...], dict[str, int]]:
    """How FlashAttention takes rows like q's: their shape, their extent, the window to the left."""
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    if documents is not None:
        cu, longest = documents
        return lambda x: x[0], (cu, cu, longest, longest), left
    return lambda x: x, (None, None, q.shape[1], q.shape[1]), left


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k and v; builds no graph."""
    window = _limiting(window, q)
    backend = backend_for(q, documents, window)
    out, lse, rest = saved
    if backend == "reference":
        return _reference_backward(dout, q, k, v, scale, documents, window)
    if backend == "flash":
        rows, extent, left = _flash_arguments(q, documents, window)
        args = (rows(x) for x in (dout.contiguous(), q, k, v, out))
        grads = aten._flash_attention_backward(
            *args, lse, *extent, 0.0, True, *rest, scale=scale, **left
        )
        return tuple(g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
    if backend == "cudnn":
        cu_q, cu_k, max_q, max_k, seed, offset = rest
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True,
            scale=scale,
        )  # fmt: skip
    else:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, _widened(k, q), _widened(v, q), out, lse, 0.0, True, scale=scale
        )
        grads = (dq, _summed(dk, k), _summed(dv, v))
    dq, dk, dv = grads
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _widened(x: Tensor, q: Tensor) -> Tensor:
    """Every query head its own keys: [b, k, s, d] -> [b, h, s, d]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_widened` for a gradient."""
    b, k, s, d = x.shape
    return grad.view(b, k, -1, s, d).sum(2)


def _reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    documents: Documents | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the inputs alone, so that second derivatives are right too."""
    b, s, h, d = q.shape
    groups = h // k.shape[2]
    wide_k, wide_v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, wide_k).to(_wide(q.dtype)) * scale
    scores = scores.masked_fill(~_seen(s, documents, window, q.device), float("-inf"))
    weights = scores.softmax(-1)
    dweights = torch.einsum("bihd,bjhd->bhij", dout, wide_v).to(weights.dtype)
    mean = (weights * dweights).sum(-1, keepdim=True)
    dscores = (weights * (dweights - mean) * scale).to(q.dtype)
    dq = torch.einsum("bhij,bjhd->bihd", dscores, wide_k)
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q)
    dv = torch.einsum("bhij,bihd->bjhd", weights.to(q.dtype), dout)
    grouped = (b, s, k.shape[2], groups, d)
    return dq, dk.view(grouped).sum(3), dv.view(grouped).sum(3)


class _Attention(torch.autograd.Function):
    """The output, its log-sum-exp, and the backend's own tensors (not differentiable)."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
        longest: int,
        window: int | None,
    ) -> Any:
        documents = None if cu_seqlens is None else Documents(cu_seqlens, longest)
        saved = attention_forward(q, k, v, scale=scale, documents=documents, window=window)
        return (saved.out, saved.lse, *saved.rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, ctx.scale, cu_seqlens, ctx.longest, ctx.window = inputs
        out, lse, *rest = output
        ctx.mark_non_differentiable(*(x for x in (lse, *rest) if isinstance(x, Tensor)))
        # Some of a backend's own are numbers, some None.
        ctx.is_tensor = [isinstance(x, Tensor) for x in rest]
        ctx.static = [None if isinstance(x, Tensor) else x for x in rest]
        ctx.save_for_backward(
            q, k, v, out, lse, cu_seqlens, *(x for x in rest if isinstance(x, Tensor))
        )

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        q, k, v, out, lse, cu_seqlens, *kept = ctx.saved_tensors
        tensors = iter(kept)
        pairs = zip(ctx.is_tensor, ctx.static, strict=True)
        rest = tuple([next(tensors) if is_tensor else x for is_tensor, x in pairs])
        documents = None if cu_seqlens is None else Documents(cu_seqlens, ctx.longest)
        if torch._C._are_functorch_transforms_active() and not rest:
            # The forward was the reference or keeps nothing of its own; fused ones cannot batch.
            grads = _reference_backward(dout, q, k, v, ctx.scale, documents, ctx.window)
        else:
            saved = Saved(out, lse, rest)
            grads = attention_backward(
                dout, q, k, v, saved, scale=ctx.scale, documents=documents, window=ctx.window
            )
        return (*grads, None, None, None, None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
        longest: int,
        window: int | None,
    ) -> Any:
        documents = None if cu_seqlens is None else Documents(cu_seqlens, longest)

        def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention_reference(q, k, v, scale=scale, documents=documents, window=window)

        outputs = torch.vmap(reference, in_dims=in_dims[:3])(q, k, v)
        return outputs, (0, 0)
