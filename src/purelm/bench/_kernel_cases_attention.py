"""The cases of `purelm bench kernels` for attention: one token over a cache, and many."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention as attention_kernel
from ..kernels import decode_attention, fp8, head_step
from ._kernel_case import Case, Shape, backward, forward, normal
from ._kernel_check import against


def decoding(shape: Shape, device: torch.device) -> Iterator[Case]:
    h, k, d = shape.heads, shape.kv_heads, shape.head_dim

    def run(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor) -> Tensor:
        return decode_attention.decode_attention(q, keys, values, first, end, scale=d**-0.5)

    def reference(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor) -> Tensor:
        return decode_attention.decode_attention_reference(
            q, keys, values, first, end, scale=d**-0.5
        )

    def inputs(b: int, length: int, stored: torch.dtype) -> Any:
        keys, values = (normal(device, b, length, k, d).to(stored) for _ in range(2))
        span = (torch.full((b,), at, device=device) for at in (0, length))
        return (normal(device, b, h, d), keys, values, *span), ()

    kinds = [(1, n, torch.bfloat16) for n in shape.caches]
    kinds += [(shape.batch, shape.caches[0], torch.bfloat16)]
    kinds += [] if fp8.lacks(device) else [(shape.batch, shape.caches[0], fp8.E4M3)]
    for b, length, stored in kinds:
        yield Case(
            "decode attention" + " in e4m3" * (stored == fp8.E4M3),
            f"{b}x{length}x{k}x{d}",
            2.0 * stored.itemsize * b * length * k * d,
            4.0 * b * length * h * d,
            partial(inputs, b, length, stored),
            forward(run),
            against(run, reference),
        )


def storing(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A new token's heads made ready, its key and value written to the cache."""
    h, k, d = shape.heads, shape.kv_heads, shape.head_dim

    def inputs(b: int) -> Any:
        qkv = normal(device, b, (h + 2 * k) * d)
        angles = torch.rand(b, d // 2, device=device).repeat(1, 2) * 6
        keys, values = (normal(device, b, 64, k, d) for _ in range(2))
        at = torch.arange(b, device=device) * 64 + 7
        return (qkv, angles.cos(), angles.sin(), keys, values, at), ()

    def run(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Any:
        return head_step.head_step(qkv, cos, sin, keys, values, at), keys, values

    def reference(
        qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
    ) -> Any:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        given = qkv, cos.to(wide), sin.to(wide), keys, values, at
        return head_step.head_step_reference(*given), keys, values

    def check(args: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
        # Each writes to a cache of its own.
        def ours(*tensors: Tensor) -> Any:
            return run(*(t.clone() for t in tensors))

        against(ours, reference)(args, ups)

    for b in (1, shape.batch):
        yield Case(
            "head step",
            f"{b}x({h}+2x{k})x{d}",
            4.0 * b * (h + 2 * k) * d + 8.0 * b * d,
            3.0 * b * (h + k) * d,
            partial(inputs, b),
            forward(run),
            check,
        )


def capping(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Attention under Gemma 2's soft cap, which our own kernels run."""
    return attending(shape, device, 50.0)


def attending(shape: Shape, device: torch.device, softcap: float | None = None) -> Iterator[Case]:
    b, s, d = shape.batch, shape.tokens // shape.batch, shape.head_dim
    products = 2.0 * b * shape.heads * s * s * d  # two, of which causality leaves half
    size = 2.0 * shape.tokens * d
    moved = size * (2 * shape.heads + 2 * shape.kv_heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_kernel.attention(q, k, v, scale=d**-0.5, softcap=softcap)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_kernel.attention_reference(q, k, v, scale=d**-0.5, softcap=softcap)[0]

    def inputs() -> Any:
        q, dout = (normal(device, b, s, shape.heads, d) for _ in range(2))
        return (q, *(normal(device, b, s, shape.kv_heads, d) for _ in range(2))), (dout,)

    def check(args: Sequence[Tensor], ups: Sequence[Tensor], wanted: Sequence[int]) -> None:
        # The first token's gradients are zeros but for rounding: a tensor is one row.
        held = against(ours, reference, wanted, flat=True)
        held([t[:1] for t in args], [t[:1] for t in ups])

    for name, wanted in (("", ()), (" backward", (0, 1, 2))):
        yield Case(
            "attention" + " softcap" * (softcap is not None) + name,
            f"{b}x{s}x({shape.heads}+{shape.kv_heads})x{d}",
            moved * (2 if wanted else 1),
            products * (2.5 if wanted else 1),
            inputs,
            backward(ours, wanted) if wanted else forward(ours),
            partial(check, wanted=wanted),
            {"wanted": wanted, "softcap": softcap},
        )
