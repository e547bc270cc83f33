"""Eight 4-bit codes of a 32-bit word to their levels, in registers.

Looking a level up in memory costs a load for every weight, and choosing it by comparisons fifteen
selects; both bound a product whose weights are read packed. A byte permute (PTX `prmt`) fetches
four of eight bytes at once by four nibbles: two of them and a third that chooses by the codes'
highest bits are a table lookup of sixteen bytes for four codes. The levels are kept as fp16 times a
scale that a product divides out again; the scale is the one at which the rounding of the levels to
fp16 is least and nearly without bias.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import codebook
from .launch import jit
from .launch import language as tl

# The level of normally distributed weights in blocks of 64 is off by 2^-15 of the largest in the
# root mean square, 2e-6 in the mean; FP4's are exact, as they are thirds.
SCALES = {"nf4": 1.5751953125, "fp4": 1.5}


@functools.cache
def table(kind: str, device: torch.device) -> Tensor:
    """int32 [8]: the low bytes of the sixteen scaled fp16 levels, four a word, then the high
    ones.
    """
    with torch.inference_mode(False), torch.no_grad():
        levels = (codebook.levels_of(kind).double() * SCALES[kind]).to(torch.float16)
        planes = levels.view(torch.uint8).view(16, 2).mT.contiguous()
        return planes.view(torch.int32).flatten().to(device)


def _instructions() -> str:
    """PTX from a word ($8) and the table ($9 to $16) to the scaled levels of its codes in order
    ($0 to $7, fp32).
    """
    lines = [
        ".reg .b32 s, m, a, b, l, h, p, q;",
        ".reg .b16 c, d, e, f;",
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
        lines += [
            "prmt.b32 p, l, h, 0x4051;",
            "prmt.b32 q, l, h, 0x6273;",
            "mov.b32 {c, d}, p;",
            "mov.b32 {e, f}, q;",
        ]
        lines += [f"cvt.f32.f16 ${i + j}, {half};" for j, half in enumerate("cdef")]
        if i == 0:
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
    return "{ " + " ".join(lines) + " }"


DECODE = _instructions()


@jit
def _levels(b_words, p_table, DECODE: tl.constexpr):
    """The eight scaled fp32 levels of each word's codes, in order."""
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
