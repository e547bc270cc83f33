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

from . import codebook
from .launch import jit
from .launch import language as tl

# The level of normally distributed weights in blocks of 64 is off by 2^-15 of the largest in the
# root mean square, 2e-6 in the mean; FP4's are exact, as they are thirds.
SCALES = {"nf4": 1.5751953125, "fp4": 1.5}


@functools.cache
def instructions(kind: str) -> str:
    """PTX from a word ($4) to four pairs of scaled fp16 levels ($0 to $3), in the order of the
    codes, the first of each pair in the low half.
    """
    levels = (codebook.levels_of(kind).double() * SCALES[kind]).to(torch.float16)
    bits = [int(b) & 0xFFFF for b in levels.view(torch.int16)]
    low, high = (_registers([b >> shift & 0xFF for b in bits]) for shift in (0, 8))
    lines = [
        ".reg .b32 s, m, a, b, l, h;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 m, $4, 1;",
        "and.b32 m, m, 0x44444444;",
        "or.b32 m, m, 0x32103210;",
    ]
    for i in (0, 2):
        for plane, table in (("l", low), ("h", high)):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, s;",
                f"prmt.b32 b, {table[2]}, {table[3]}, s;",
                f"prmt.b32 {plane}, a, b, m;",
            ]
        # Of two codes in a byte the first is the high nibble.
        lines += [f"prmt.b32 ${i}, l, h, 0x4051;", f"prmt.b32 ${i + 1}, l, h, 0x6273;"]
        if i == 0:
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
    return "{ " + " ".join(lines) + " }"


def _registers(table: list[int]) -> list[str]:
    """Sixteen bytes as four little-endian words."""
    return [
        f"0x{int.from_bytes(bytes(table[i : i + 4]), 'little'):08x}" for i in range(0, 16, 4)
    ]


@jit
def _pairs(b_words, DECODE: tl.constexpr):
    return tl.inline_asm_elementwise(
        DECODE,
        "=&r,=&r,=&r,=&r,r",
        [b_words],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
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
