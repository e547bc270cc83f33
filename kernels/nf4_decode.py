"""Eight 4-bit codes of a 32-bit word to their levels in 16 bits, in registers.

Looking a level up in memory costs a load for every weight, and choosing it by comparisons fifteen
selects; both bound a product whose weights are read packed. A byte permute (PTX `prmt`) fetches
four of eight bytes at once by four nibbles: two of them and a third that chooses by the codes'
highest bits are a table lookup of sixteen bytes for four codes. The levels are kept in the type of
x times a scale that a product divides out again; the scale is one at which the rounding of NF4's
levels is small and without bias for normally distributed weights. FP4's are exact, as they are
thirds.

What products share beside that is here too: a block's maximum, and a tile of weights.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import codebook
from .codebook import GROUP
from .launch import jit
from .launch import language as tl

# Codes of one 32-bit word.
WORD = 8
# In blocks of 64 normal weights the levels are off, of the largest, by 4e-4 in the root mean square
# in bf16 (a dense bf16 weight by 3e-4) and 3e-5 in fp16, by 7e-7 and 2e-6 in the mean.
SCALES = {
    ("nf4", torch.bfloat16): 1.1884765625,
    ("nf4", torch.float16): 1.5751953125,
    ("fp4", torch.bfloat16): 1.5,
    ("fp4", torch.float16): 1.5,
}


@functools.cache
def table(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """int32 [8]: the low bytes of the sixteen scaled levels in `dtype`, four a word, then the high
    ones.
    """
    with torch.inference_mode(False), torch.no_grad():
        levels = (codebook.levels_of(kind).double() * SCALES[kind, dtype]).to(dtype)
        planes = levels.view(torch.uint8).view(16, 2).mT.contiguous()
        return planes.view(torch.int32).flatten().to(device)


@functools.cache
def lanes(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """int32 [16]: the scaled levels in `dtype`, one in the low half of each."""
    with torch.inference_mode(False), torch.no_grad():
        levels = (codebook.levels_of(kind).double() * SCALES[kind, dtype]).to(dtype)
        return (levels.view(torch.int16).to(torch.int32) & 0xFFFF).to(device)


def _instructions(wide: bool) -> str:
    """PTX from a word ($8) and the table ($9 to $16) to the scaled levels of its codes in order
    ($0 to $7), in 16 bits or, from fp16, in fp32.
    """
    lines = [
        ".reg .b32 s, m, a, b, l, h, p;",
        ".reg .b16 c, d;",
        "and.b32 s, $8, 0x77777777;",
        "shr.u32 m, $8, 1;",
        "and.b32 m, m, 0x44444444;",
        "or.b32 m, m, 0x32103210;",
    ]
    for i in (0, 4):
        for plane, first in (("l", 9), ("h", 13)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, s;",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, s;",
                f"prmt.b32 {plane}, a, b, m;",
            ]
        # Of two codes in a byte the first is the high nibble.
        for at, order in ((i, "0x4051"), (i + 2, "0x6273")):
            lines += [f"prmt.b32 p, l, h, {order};"]
            if wide:
                lines += ["mov.b32 {c, d}, p;"]
                lines += [f"cvt.f32.f16 ${at}, c;", f"cvt.f32.f16 ${at + 1}, d;"]
            else:
                lines += [f"mov.b32 {{${at}, ${at + 1}}}, p;"]
        if i == 0:
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
    return "{ " + " ".join(lines) + " }"


def _shuffles() -> str:
    """PTX from a word ($8) and the address of `lanes` ($9) to the scaled levels of its codes in
    order ($0 to $7), in 16 bits: lane i of a warp holds level i % 16, and each code, of whose word
    a shuffle looks at five bits, fetches its own. The warp must be together.
    """
    lines = [
        ".reg .b32 s, a, b, t;",
        ".reg .b64 p;",
        "mov.u32 s, %laneid;",
        "and.b32 s, s, 15;",
        "mul.wide.u32 p, s, 4;",
        "add.s64 p, p, $9;",
        "ld.global.nc.b32 t, [p];",
    ]
    for i in range(0, WORD, 2):
        # Of two codes in a byte the first is the high nibble.
        for register, shift in (("a", 4 * i + 4), ("b", 4 * i)):
            lines += [
                f"shr.u32 s, $8, {shift};",
                f"shfl.sync.idx.b32 {register}, t, s, 31, 0xffffffff;",
            ]
        lines += ["prmt.b32 a, a, b, 0x5410;", f"mov.b32 {{${i}, ${i + 1}}}, a;"]
    return "{ " + " ".join(lines) + " }"


DECODE = _instructions(wide=True)
FRAGMENTS = _instructions(wide=False)
SHUFFLES = _shuffles()


@jit
def _levels(b_words, p_table, DECODE: tl.constexpr):
    """The eight scaled fp32 levels of each word's codes, in order, from the table in fp16."""
    return tl.inline_asm_elementwise(
        DECODE,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r",
        [
            b_words,
            tl.load(p_table),
            tl.load(p_table + 1),
            tl.load(p_table + 2),
            tl.load(p_table + 3),
            tl.load(p_table + 4),
            tl.load(p_table + 5),
            tl.load(p_table + 6),
            tl.load(p_table + 7),
        ],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@jit
def _fragments(b_words, p_table, o, FRAGMENTS: tl.constexpr):
    """uint16 [..., 2, 2, 2]: the scaled levels of each word's codes, the first axis after those of
    the words counting single codes, the last fours.

    o: zeros of a shape that spreads over `b_words`; a table that the compiler takes for the same in
    all threads would be moved from uniform registers at every use.
    """
    b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = tl.inline_asm_elementwise(
        FRAGMENTS,
        "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,r,r,r,r,r",
        [
            b_words,
            tl.load(p_table + o),
            tl.load(p_table + 1 + o),
            tl.load(p_table + 2 + o),
            tl.load(p_table + 3 + o),
            tl.load(p_table + 4 + o),
            tl.load(p_table + 5 + o),
            tl.load(p_table + 6 + o),
            tl.load(p_table + 7 + o),
        ],
        dtype=(tl.uint16,) * 8,
        is_pure=True,
        pack=1,
    )
    return _eight(b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7)


@jit
def _eight(b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7):
    """[..., 2, 2, 2]: the first axis counts single codes, the last fours."""
    b_03 = tl.join(tl.join(b_0, b_1), tl.join(b_2, b_3))
    b_47 = tl.join(tl.join(b_4, b_5), tl.join(b_6, b_7))
    return tl.join(b_03, b_47)


@jit
def _shuffled(b_words, p_lanes, SHUFFLES: tl.constexpr):
    """As `_fragments`, by shuffles; p_lanes: what `lanes` makes."""
    b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = tl.inline_asm_elementwise(
        SHUFFLES,
        "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,l",
        [b_words, p_lanes.to(tl.int64)],
        dtype=(tl.uint16,) * 8,
        is_pure=True,
        pack=1,
    )
    return _eight(b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7)


@jit
def _codes(b_words, p_levels):
    """The eight fp32 levels of a word, by eight lookups: for products in fp32."""
    return (
        tl.load(p_levels + ((b_words >> 4) & 15)),
        tl.load(p_levels + (b_words & 15)),
        tl.load(p_levels + ((b_words >> 12) & 15)),
        tl.load(p_levels + ((b_words >> 8) & 15)),
        tl.load(p_levels + ((b_words >> 20) & 15)),
        tl.load(p_levels + ((b_words >> 16) & 15)),
        tl.load(p_levels + ((b_words >> 28) & 15)),
        tl.load(p_levels + ((b_words >> 24) & 15)),
    )


@jit
def _absmax(p_absmax, p_scale, p_offset, p_map, o_block, mask, DOUBLE: tl.constexpr):
    """The fp32 maxima of the blocks o_block, from either form."""
    if DOUBLE:
        b_code = tl.load(p_absmax + o_block, mask=mask, other=0).to(tl.int32)
        b_scale = tl.load(p_scale + o_block // GROUP, mask=mask, other=0.0)
        b_absmax = tl.load(p_map + b_code) * b_scale + tl.load(p_offset)
    else:
        b_absmax = tl.load(p_absmax + o_block, mask=mask, other=0.0)
    return b_absmax


@jit
def _weights(
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    o_run,
    mask,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOUBLE: tl.constexpr,
    DECODE: tl.constexpr,
    UNSCALE: tl.constexpr,
    dtype: tl.constexpr,
):
    """The weights [N, K] of a matrix at the runs o_run [N, K / WIDTH], in `dtype`."""
    WORDS: tl.constexpr = WIDTH // WORD
    o_block = o_run // (BLOCK // WIDTH)
    b_absmax = _absmax(p_absmax, p_scale, p_offset, p_map, o_block, mask, DOUBLE)
    b_absmax = (b_absmax * UNSCALE)[:, :, None]
    o_w = o_run[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    b_words = tl.load(p_words + o_w, mask=mask[:, :, None], other=0)
    if DECODE is None:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = _codes(b_words, p_levels)
    else:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = _levels(b_words, p_levels, DECODE)
    # Of runs this short Triton fails to lay a 16-bit operand out for wgmma: they are rounded last.
    inner: tl.constexpr = tl.float32 if WIDTH < 64 else dtype
    b_04 = tl.join((b_0 * b_absmax).to(inner), (b_4 * b_absmax).to(inner))
    b_15 = tl.join((b_1 * b_absmax).to(inner), (b_5 * b_absmax).to(inner))
    b_26 = tl.join((b_2 * b_absmax).to(inner), (b_6 * b_absmax).to(inner))
    b_37 = tl.join((b_3 * b_absmax).to(inner), (b_7 * b_absmax).to(inner))
    b_w = tl.join(tl.join(b_04, b_26), tl.join(b_15, b_37))
    return tl.reshape(b_w, (N, K)).to(dtype)
