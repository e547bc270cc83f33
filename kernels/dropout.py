"""Dropout whose mask follows from a seed and the places of features alone: the same on every
device, drawn again in a backward rather than kept, and, as part of the seed may lie on the device,
anew in every replay of a captured step.

The draws are Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import apply, ceil_div, jit, on_gpu, operator, ops
from .launch import language as tl

BLOCK, WARPS = 1024, 4
# Of a draw's 32 bits, those that are compared: fp32 holds a share of so many exactly.
BITS = 24
_KEYS, _ROUNDS, _LOW = (0x9E3779B9, 0xBB67AE85), (0xD2511F53, 0xCD9E8D57), 0xFFFFFFFF


class Ahead(int):
    """A seed so far ahead of an int64 [] on a device, which may change between replays."""

    base: Tensor

    def __new__(cls, steps: int, base: Tensor) -> Ahead:
        made = super().__new__(cls, steps)
        made.base = base
        return made

    def __add__(self, steps: Any) -> Ahead:
        return Ahead(int(self) + steps, self.base)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each feature 0 with probability p, else divided by 1 - p; the same for x of as many.

    seed: below 2^63, or `Ahead`. Differentiable: its gradient is `dropped` of a gradient.
    """
    if not 0 <= p < 1:
        raise KernelError(f"dropout of {p}: expected at least 0 and less than 1")
    made: Tensor = apply(_Dropped, x, p, seed)
    return made


class _Dropped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        return _dropped(x, p, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return dropped(grad, ctx.p, ctx.seed), None, None


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    base = seed.base if isinstance(seed, Ahead) else None
    if on_gpu(x, base):
        made: Tensor = ops.dropped(x, base, int(seed), p)
        return made
    return dropped_reference(x, p, seed)


def dropped_reference(x: Tensor, p: float, seed: int) -> Tensor:
    """Plain torch for `dropped`."""
    # Chosen and not multiplied, as an infinity times 0 is NaN.
    return torch.where(mask(x.shape, p, seed, x.device), x * _scale(p), 0.0)


def mask(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    """Which features stay, bool, in plain torch."""
    key = torch.tensor(int(seed), device=device)
    if isinstance(seed, Ahead):
        key = key + seed.base.to(device)
    count = shape.numel()
    # Of every counter four draws, which lie BLOCK apart in a block of four times as many.
    counters = torch.arange(ceil_div(count, 4 * BLOCK) * BLOCK, device=device)
    draws = torch.stack([t.view(-1, BLOCK) for t in _philox(counters, key)], 1).flatten()
    return (draws[:count] >> (32 - BITS) >= _threshold(p)).view(shape)


def _philox(counters: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit draws, int64, of each counter below 2^32."""
    c0, c1, c2, c3 = counters, *(torch.zeros_like(counters) for _ in range(3))
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        a, b = c0, c2
        c0, c2 = _high(_ROUNDS[1], b) ^ c1 ^ k0, _high(_ROUNDS[0], a) ^ c3 ^ k1
        c1, c3 = _ROUNDS[1] * b & _LOW, _ROUNDS[0] * a & _LOW
        k0, k1 = k0 + _KEYS[0] & _LOW, k1 + _KEYS[1] & _LOW
    return c0, c1, c2, c3


def _high(factor: int, x: Tensor) -> Tensor:
    """The upper 32 of the 64 bits of a product of two 32-bit numbers."""
    return factor * (x >> 16) + (factor * (x & 0xFFFF) >> 16) >> 16


def _threshold(p: float) -> int:
    return round(p * (1 << BITS))


def _scale(p: float) -> float:
    return 1 / (1 - p)


@jit
def _dropped_kernel(
    p_x, p_base, p_out, count, seed, threshold, scale,
    ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    key = tl.cast(seed, tl.int64)
    if ON_DEVICE:
        key += tl.load(p_base)
    counters = block * BLOCK + tl.arange(0, BLOCK)
    draws = tl.randint4x(key, counters)
    for i in tl.static_range(4):
        o = block.to(tl.int64) * 4 * BLOCK + i * BLOCK + tl.arange(0, BLOCK)
        m = o < count
        stays = (draws[i].to(tl.uint32, bitcast=True) >> 8).to(tl.int32) >= threshold
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out + o, tl.where(stays, x * scale, 0.0).to(p_out.dtype.element_ty), mask=m)


@operator(
    "dropped(Tensor x, Tensor? base, int seed, float p) -> Tensor",
    fake=lambda x, base, seed, p: x.new_empty(x.shape),
)
def _launch(x: Tensor, base: Tensor | None, seed: int, p: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _dropped_kernel(
        (ceil_div(x.numel(), 4 * BLOCK),),
        x,
        base,
        out,
        x.numel(),
        seed,
        _threshold(p),
        _scale(p),
        ON_DEVICE=base is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out
