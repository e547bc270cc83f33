"""Causal attention forward and backward as two functions, over the fastest backend that serves.

softmax(scale q k^T) v with grouped heads: q [b, s, h, d], k and v [b, s, k, d]; what else it may
have is in `Terms`. Torch's own fused backends have packed rows and windows, `flash`'s kernels have
soft caps, sinks and biases too. (Compiled flex_attention has them as well, after seconds of
compilation for each new kind of shape; our kernels compile once.) The statistics are fp32 in every
backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from ..errors import KernelError
from . import flash_launch
from .attention_reference import (
    Documents,
    Keywords,
    Terms,
    one_row,
    reference,
    reference_backward,
    sinks_gradient,
)
from .launch import apply, on_gpu, once, ops

__all__ = [
    "Documents",
    "Saved",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_reference",
    "backend_for",
    "fused",
    "sinks_gradient",
]

aten = torch.ops.aten

Backend = Literal["cudnn", "flash", "flash_cpu", "triton", "reference"]


def backend_for(
    q: Tensor,
    documents: Documents | None = None,
    window: int | None = None,
    plain: bool = True,
) -> Backend:
    """Which backend runs queries like `q` [b, s, h, d]: a pure function of device, dtype, shape.

    cuDNN for dense rows on GPUs of compute capability 9 and above; FlashAttention-2 for packed
    rows, windows and older GPUs; our own kernels (`flash_launch`) for what is not `plain` (soft
    cap, sinks, bias) and for head dims that FlashAttention-2 cannot take; torch's fused CPU kernel,
    which has none of them; else the plain-torch reference, which also serves fp32 on GPUs.
    """
    dense = documents is None and window is None
    head_dim = q.shape[-1]
    if q.is_cuda:
        if not fused(q.device, q.dtype):
            return "reference"
        if not plain or head_dim % 8:
            return "triton" if on_gpu(q) and head_dim in flash_launch.DIMS else "reference"
        if dense and head_dim <= 128 and torch.cuda.get_device_capability(q.device)[0] >= 9:
            return "cudnn"
        return "flash" if head_dim <= 256 else "reference"
    if not plain and on_gpu(q) and head_dim in flash_launch.DIMS:
        return "triton"  # under the interpreter
    return "flash_cpu" if q.device.type == "cpu" and plain and dense else "reference"


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether documents of heads like these meet a fused kernel."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return major >= 8 and dtype in (torch.bfloat16, torch.float16)


def attention(q: Tensor, k: Tensor, v: Tensor, **how: Unpack[Keywords]) -> Tensor:
    """[b, s, h, d], differentiable (in the sinks too, not in the bias); under torch.vmap the
    plain-torch reference runs.
    """
    terms = Terms(**how)
    cu_seqlens, longest = terms.documents or (None, 0)
    out: Tensor = apply(
        _Attention, q, k, v, terms.sinks, terms.bias, cu_seqlens, longest, terms.scale,
        terms.window, terms.softcap,
    )[0]  # fmt: skip
    return out


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, **how: Unpack[Keywords]
) -> tuple[Tensor, Tensor]:
    """(out [b, s, h, d], log-sum-exp [b, h, s] fp32) in plain differentiable operations."""
    return reference(q, k, v, Terms(**how))


class Saved(NamedTuple):
    """What a backward needs beside q, k, v: the output, its log-sum-exp, the backend's own."""

    out: Tensor
    lse: Tensor
    rest: tuple[Any, ...]


def attention_forward(q: Tensor, k: Tensor, v: Tensor, **how: Unpack[Keywords]) -> Saved:
    """The output [b, s, h, d] with what `attention_backward` needs; builds no graph.

    Raises KernelError for shapes that do not belong together.
    """
    if q.shape[2] % k.shape[2] or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise KernelError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together: "
            "expected [b, s, h, d] and twice [b, s, k, d] with h a multiple of k"
        )
    terms = _limited(Terms(**how), q)
    backend = _backend(q, terms)
    if backend == "reference":
        return Saved(*reference(q, k, v, terms), ())
    shape = q.shape
    q, k, v = (one_row(x, terms) for x in (q, k, v))
    if backend == "triton":
        sinks = None if terms.sinks is None else terms.sinks.float()
        cu_seqlens, longest = terms.documents or (None, 0)
        out, lse = ops.flash_forward(
            q, k, v, cu_seqlens, longest, sinks, terms.bias, terms.scale, terms.softcap or 0.0,
            terms.window or 0,
        )  # fmt: skip
        return Saved(out.view(shape), lse, ())
    if backend == "flash":
        rows, extent, left = _flash_arguments(q, terms)
        out, lse, *rest = aten._flash_attention_forward(
            *(rows(x) for x in (q, k, v)), *extent, 0.0, True, False, scale=terms.scale, **left
        )
        return Saved(out.view(shape), lse, tuple(rest[:2]))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "cudnn":
        out, lse, *rest = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=terms.scale
        )
        return Saved(out.transpose(1, 2), lse, tuple(rest[:6]))
    k, v = _widened(k, q), _widened(v, q)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=terms.scale
    )
    return Saved(out.transpose(1, 2), lse, ())


def _limited(terms: Terms, q: Tensor) -> Terms:
    """Without a window that hides nothing of rows as long as q's."""
    idle = terms.window is not None and terms.window >= q.shape[1]
    return terms._replace(window=None) if idle else terms


def _backend(q: Tensor, terms: Terms) -> Backend:
    return backend_for(q, terms.documents, terms.window, terms.plain)


def _flash_arguments(
    q: Tensor, terms: Terms
) -> tuple[Callable[[Tensor], Tensor], tuple[Any, ...], dict[str, int]]:
    """How FlashAttention takes rows like q's: their shape, their extent, the window to the left."""
    window = terms.window
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    if terms.documents is not None:
        cu, longest = terms.documents
        return lambda x: x[0], (cu, cu, longest, longest), left
    return lambda x: x, (None, None, q.shape[1], q.shape[1]), left


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, **how: Unpack[Keywords]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k and v; builds no graph. The gradient of the sinks is
    `sinks_gradient`'s.
    """
    terms = _limited(Terms(**how), q)
    backend = _backend(q, terms)
    out, lse, rest = saved
    if backend == "reference":
        return reference_backward(dout, q, k, v, terms)[:3]
    shapes = q.shape, k.shape, v.shape
    dout, q, k, v, out = (one_row(x, terms) for x in (dout, q, k, v, out))
    if backend == "triton":
        cu_seqlens, longest = terms.documents or (None, 0)
        grads = once(
            ops.flash_backward, dout, q, k, v, out, lse, cu_seqlens, longest, terms.bias,
            terms.scale, terms.softcap or 0.0, terms.window or 0,
        )  # fmt: skip
        return tuple(g.view(shape) for g, shape in zip(grads, shapes, strict=True))
    if backend == "flash":
        rows, extent, left = _flash_arguments(q, terms)
        args = (rows(x) for x in (dout.contiguous(), q, k, v, out))
        grads = aten._flash_attention_backward(
            *args, lse, *extent, 0.0, True, *rest, scale=terms.scale, **left
        )
        return tuple(g.view(shape) for g, shape in zip(grads, shapes, strict=True))
    q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
    if backend == "cudnn":
        cu_q, cu_k, max_q, max_k, seed, offset = rest
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True,
            scale=terms.scale,
        )  # fmt: skip
    else:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, _widened(k, q), _widened(v, q), out, lse, 0.0, True, scale=terms.scale
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


class _Attention(torch.autograd.Function):
    """The output, its log-sum-exp, and the backend's own tensors (not differentiable)."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        longest: int,
        *static: Any,
    ) -> Any:
        how = _keywords(sinks, bias, cu_seqlens, longest, *static)
        saved = attention_forward(q, k, v, **how)
        return (saved.out, saved.lse, *saved.rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.longest, ctx.scale, ctx.window, ctx.softcap = inputs
        out, lse, *rest = output
        ctx.mark_non_differentiable(*(x for x in (lse, *rest) if isinstance(x, Tensor)))
        # Some of a backend's own are numbers, some None.
        ctx.is_tensor = [isinstance(x, Tensor) for x in rest]
        ctx.static = [None if isinstance(x, Tensor) else x for x in rest]
        ctx.save_for_backward(*tensors, out, lse, *(x for x in rest if isinstance(x, Tensor)))

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        q, k, v, sinks, bias, cu_seqlens, out, lse, *kept = ctx.saved_tensors
        tensors = iter(kept)
        pairs = zip(ctx.is_tensor, ctx.static, strict=True)
        rest = tuple([next(tensors) if is_tensor else x for is_tensor, x in pairs])
        how = _keywords(sinks, bias, cu_seqlens, ctx.longest, ctx.scale, ctx.window, ctx.softcap)
        terms = _limited(Terms(**how), q)
        transformed = torch._C._are_functorch_transforms_active() and not rest
        if _backend(q, terms) == "reference" or (transformed and not _ours(q, terms)):
            # The forward was the reference or keeps nothing of its own; fused ones cannot batch.
            dq, dk, dv, dsinks = reference_backward(dout, q, k, v, terms)
        else:
            dq, dk, dv = attention_backward(dout, q, k, v, Saved(out, lse, rest), **how)
            dsinks = None
            if sinks is not None and ctx.needs_input_grad[3]:
                dsinks = sinks_gradient(dout, out, lse, sinks)
        return (dq, dk, dv, dsinks, *(None,) * 6)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        q, k, v, sinks, *others = inputs

        def plainly(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Any:
            return attention_reference(q, k, v, **_keywords(sinks, *others))

        outputs = torch.vmap(plainly, in_dims=in_dims[:4])(q, k, v, sinks)
        return outputs, (0, 0)


def _ours(q: Tensor, terms: Terms) -> bool:
    return _backend(q, terms) == "triton"


def _keywords(
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Keywords:
    return {
        "scale": scale,
        "documents": None if cu_seqlens is None else Documents(cu_seqlens, longest),
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "bias": bias,
    }
