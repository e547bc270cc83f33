"""Compile every kernel in every configuration for one GPU architecture, with no GPU; print a CSV
line each.

Run as a program, `python compile_lane.py 90 [--few | --all]`, without TRITON_INTERPRET: a process
either interprets or compiles. --few: some configurations of each kernel. Columns: kernel, variant,
registers a thread, stack bytes (more than 0: spills), shared memory bytes, widest global access.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from purelm.kernels import (
    clamped,
    cross_entropy_rows,
    decode_attention,
    delta_launch,
    delta_scan,
    dropout,
    flash,
    flash_launch,
    fp8_launch,
    fp8_made,
    fp8_nf4_launch,
    gated,
    gated_norm,
    grouped_dense_launch,
    grouped_nf4_launch,
    head_step,
    low_rank,
    nf4,
    nf4_decode,
    nf4_launch,
    nf4_matvec_launch,
    nf4_products,
    nf4_quantize_launch,
    nf4_row,
    nf4_tensor,
    rms_norm_launch,
    rope_launch,
    short_conv,
    ssd,
    ssd_scan,
    state_step,
    weighted_rows,
)
from purelm.kernels.launch import Kernel, power_of_two

F32, F16, BF16, U8, I32, I64, E4M3 = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
)


# Kernels whose products and sums are rounded apart, as their references'.
EXACT = (
    nf4_quantize_launch._quantize_kernel,
    nf4_quantize_launch._quantize_absmax_kernel,
    nf4_launch._dequantize_kernel,
    fp8_launch._cast_kernel,
    fp8_nf4_launch._columns_kernel,
    fp8_nf4_launch._rows_kernel,
    rope_launch._rope_kernel,
)


# How the name of a kernel's case begins that has 1 for all of its numbers.
ONES = "ones: "


class Case(NamedTuple):
    """One specialization of a kernel: dtypes stand for pointers, numbers for themselves."""

    name: str
    kernel: Kernel
    args: tuple[Any, ...]
    options: dict[str, Any]


def nf4_cases(every: bool) -> Iterator[Case]:
    count = 4096 * 4096
    for block in nf4.BLOCKS if every else (32, 64, 4096):
        config = nf4_quantize_launch.quantize_config(block)
        cut = {"BLOCK": block, "ROWS": config.rows, "TURNS": config.turns}
        cut |= {"num_warps": config.num_warps}
        for dtype in (F32, F16, BF16):
            yield Case(
                f"nf4_quantize block={block} {dtype}",
                nf4_quantize_launch._quantize_kernel,
                (dtype, I32, F32, F32, None, I32, count, count // 8, count // block),
                cut,
            )
        yield Case(
            f"nf4_quantize bytes block={block}",
            nf4_quantize_launch._quantize_kernel,
            (BF16, U8, F32, F32, None, I32, count - 1, count // 2, count // block),
            cut,
        )
        yield Case(
            f"fp4_quantize block={block}",
            nf4_quantize_launch._quantize_kernel,
            (BF16, I32, F32, F32, U8, I32, count, count // 8, count // block),
            cut,
        )
        cut = {"BLOCK": block, "WORDS": 32 * nf4_launch.WARPS, "TURNS": nf4_launch.TURNS}
        cut |= {"num_warps": nf4_launch.WARPS}
        for dtype, double in itertools.product((F32, F16, BF16), (False, True)):
            absmax = (U8, F32, F32) if double else (F32, None, None)
            for name, packed, stored, end in (
                ("", I32, count // 8, count),
                (" bytes", U8, count // 2, count - 1),
            ):
                yield Case(
                    f"nf4_dequantize{name} block={block} {dtype} double={double}",
                    nf4_launch._dequantize_kernel,
                    (packed, *absmax, F32, F32, dtype, stored, end),
                    cut | {"DOUBLE": double},
                )
    yield Case(
        "nf4_quantize_absmax",
        nf4_quantize_launch._quantize_absmax_kernel,
        (F32, F32, U8, U8, F32, F32, count // 64, count // 64 // 256, count // 64 // 4096),
        {"ROWS": nf4_quantize_launch.ABSMAX_ROWS, "num_warps": 4},
    )
    yield Case(
        "nf4_quantize_absmax of one block",
        nf4_quantize_launch._quantize_absmax_kernel,
        (F32, F32, U8, U8, F32, F32, 1, 1, 1),
        {"ROWS": nf4_quantize_launch.ABSMAX_ROWS, "num_warps": 4},
    )
    yield Case(
        "nf4_sums",
        nf4_quantize_launch._sums_kernel,
        (F32, F32, count // 64),
        {"SUMMED": nf4_quantize_launch.SUMMED, "num_warps": 4},
    )


def nf4_matvec_cases(every: bool) -> Iterator[Case]:
    """In fp32, where no weight is decoded in registers."""
    shapes = ((512, 2048), (14336, 4096))
    for rows, (outputs, width), block, double, rank in itertools.product(
        (1, 2, 17, 64) if every else (1, 4),
        shapes,
        (32, 64, 4096) if every else (64,),
        (False, True) if every else (True,),
        (0, 16) if every else (16,),
    ):
        config = nf4_matvec_launch.config_for(rows, outputs, width, block)
        unit = min(block, nf4_launch.UNIT)
        runs = width // unit
        absmax = (U8, F32, F32) if double else (F32, None, None)
        term = (F32, F32) if rank else (None, None)
        one = rows == 1
        yield Case(
            f"nf4_matvec {rows}x{width}x{outputs} {block=} {double=} {rank=}",
            nf4_matvec_launch._vector_kernel if one else nf4_matvec_launch._rows_kernel,
            (F32, I32, *absmax, F32, F32, *term, F32)
            + (() if one else (rows,))
            + (outputs, runs, runs // config.split, rank),
            {
                "BLOCK": block,
                "WIDTH": unit,
                "OUTPUTS": config.outputs,
                "RUNS": config.runs,
                "RANK": rank,
                "DOUBLE": double,
                "num_warps": config.num_warps,
                **({} if one else {"ROWS": max(16, power_of_two(rows))}),
            },
        )


def grouped_cases(every: bool, arch: int) -> Iterator[Case]:
    """Products of 128 experts, 768 wide: at 1, 16 and 128 rows an expert."""
    groups, wide, narrow = 128, 2048, 768
    shapes = ((narrow, wide, 16), (wide, narrow, 16), (16, wide, 0))
    dtypes = (F32, F16, BF16) if every else (BF16,)
    for rows, (outputs, depth, rank), dtype in itertools.product(
        (128, 2048, 65536), shapes, dtypes
    ):
        cut = grouped_dense_launch.dense_config(rows, groups, outputs, depth, dtype, arch // 10)
        launch = {"GROUPS": groups, "num_warps": cut.num_warps, "num_stages": cut.num_stages}
        term = (dtype, dtype) if rank else (None, None)
        weight = (outputs * depth, depth, 1)
        steps = (outputs * rank, rank, 1) if rank else (0, 0, 0)
        for turned in (False, True) if rank else (False,):
            yield Case(
                f"grouped_dense {rows}x{depth}x{outputs} {dtype} {turned=}",
                grouped_dense_launch._dense_kernel,
                (dtype, dtype, *term, dtype, I32, groups, outputs, depth, rank)
                + (weight[0], 1, outputs) * turned
                + weight * (not turned)
                + steps,
                {"ROWS": cut.rows, "OUTPUTS": cut.outputs, "DEPTH": cut.depth, "RANK": rank}
                | {"EVEN": depth % cut.depth == 0, **launch},
            )
        cut = grouped_dense_launch.outer_config(outputs, depth, dtype)
        yield Case(
            f"grouped_outer {outputs}x{depth} {dtype}",
            grouped_dense_launch._outer_kernel,
            (dtype, dtype, dtype, I32, outputs, depth),
            {"ROWS": cut.rows, "P": cut.outputs, "Q": cut.depth, "num_warps": cut.num_warps}
            | {"num_stages": cut.num_stages},
        )
        if not rank:
            continue
        for block, double, turned in itertools.product(
            (32, 64, 4096) if every else (32, 64),
            (False, True) if every else (True,),
            (False, True),
        ):
            if block == 32 and not every and (rows < 65536 or depth != wide):
                continue
            cut = grouped_nf4_launch.nf4_config(
                rows, groups, outputs, depth, block, dtype, turned, arch // 10
            )
            unit = min(block, nf4_launch.UNIT)
            absmax = (U8, F32, F32) if double else (F32, None, None)
            blocks = outputs * depth // block
            tile = {"OUTPUTS": cut.outputs, "RUNS": cut.depth // unit, "TURNED": turned}
            if turned:
                tile |= {"OUTPUTS": cut.depth, "RUNS": cut.outputs // unit}
            yield Case(
                f"grouped_nf4 {rows}x{depth}x{outputs} {block=} {dtype} {double=} {turned=}",
                grouped_nf4_launch._nf4_kernel,
                (dtype, I32, *absmax, F32 if dtype == F32 else I32, F32, *term, dtype, I32)
                + (groups, outputs, depth // unit, rank, outputs * depth // 8, blocks)
                + (blocks // 256, *steps),
                {"BLOCK": block, "WIDTH": unit, "ROWS": cut.rows, "RANK": rank, "DOUBLE": double}
                | {"DECODE": None if dtype == F32 else nf4_decode.DECODE}
                | {"UNSCALE": 1.0 if dtype == F32 else 1.0 / nf4_decode.SCALES["nf4", F16]}
                | {**tile, "GROUPS": groups, "num_warps": cut.num_warps}
                | {"num_stages": cut.num_stages},
            )


def low_rank_cases(every: bool, arch: int) -> Iterator[Case]:
    most = low_rank.MOST_RANK if arch >= 90 else low_rank.NARROW_RANK
    for rank, dtype in itertools.product((16, 48, most), (F16, BF16) if every else (BF16,)):
        yield Case(
            f"add_low_rank {rank} {dtype}",
            low_rank._add_kernel,
            (dtype, dtype, dtype, 16384, 14336, rank, 14336, rank, 1, 1, rank),
            {
                "RANK": power_of_two(rank),
                "ROWS": low_rank.ROWS,
                "COLUMNS": low_rank.COLUMNS,
                "num_warps": low_rank.WARPS,
            },
        )


def weighted_rows_cases(every: bool) -> Iterator[Case]:
    for dtype, weighed in itertools.product((F32, F16, BF16) if every else (BF16,), (True, False)):
        yield Case(
            f"weighted_sum {dtype} {weighed=}",
            weighted_rows._sum_kernel,
            (dtype, I64, F32 if weighed else None, dtype, 2048),
            {
                "ACTIVE": 8,
                "WEIGHED": weighed,
                "COLUMNS": weighted_rows.COLUMNS,
                "num_warps": weighted_rows.WARPS,
            },
        )
        yield Case(
            f"row_dots {dtype}",
            weighted_rows._dots_kernel,
            (dtype, dtype, F32, 131072, 768),
            {
                "ROWS": weighted_rows.DOT_ROWS,
                "COLUMNS": weighted_rows.DOT_COLUMNS,
                "num_warps": weighted_rows.WARPS,
            },
        )


def dropout_cases(every: bool) -> Iterator[Case]:
    for dtype, base in itertools.product((F32, F16, BF16) if every else (BF16,), (None, I64)):
        yield Case(
            f"dropped {dtype} {base=}",
            dropout._dropped_kernel,
            (dtype, base, dtype, 16384 * 4096, 3407 * 1_000_003, 1 << 20, 1.1),
            {"ON_DEVICE": base is not None, "BLOCK": dropout.BLOCK, "num_warps": dropout.WARPS},
        )


def fp8_cases(every: bool) -> Iterator[Case]:
    """For GPUs that have e4m3: compute capability 8.9 and above."""
    widths: tuple[tuple[int, ...], ...] = (
        (576,),
        (4096,),
        (14336,),
        (14336, 14336),
        (28672, 28672),
        (4096, 1024, 1024),
    )
    for parts, dtype in itertools.product(widths, (F32, F16, BF16) if every else (BF16,)):
        (x, y, z), warps = fp8_launch.cast_config(parts)
        none = 3 - len(parts)
        strides = parts + (0,) * none
        yield Case(
            f"fp8_cast_rows {'+'.join(map(str, parts))} {dtype}",
            fp8_launch._cast_kernel,
            (dtype,) * len(parts) + (None,) * none + (E4M3, F32, *strides, *strides, sum(parts)),
            {"X": x, "Y": y, "Z": z, "CHUNK": fp8_launch.CHUNK, "num_warps": warps},
        )
    for width, dtype in itertools.product(
        (576, 4096, 14336), (F32, F16, BF16) if every else (BF16,)
    ):
        warps = fp8_made.warps_for(width, fp8_made.HELD)
        shape = {"BLOCK": power_of_two(width), "num_warps": warps}
        yield Case(
            f"fp8_norm_rows {width} {dtype}",
            fp8_made._norm_kernel,
            (dtype, dtype, dtype, E4M3, F32, width),
            {"EPS": 1e-5, "OFFSET": 0.0, "CAST_FIRST": True, **shape},
        )
        for activation in gated.ACTIVATIONS if every else ("silu",):
            yield Case(
                f"fp8_gated_rows {width} {activation} {dtype}",
                fp8_made._gated_kernel,
                (dtype, dtype, dtype, E4M3, F32, width),
                {"ACTIVATION": activation, **shape},
            )
            yield Case(
                f"fp8_gated_pull_rows {dtype} {width} {activation}",
                fp8_made._gated_pull_kernel,
                (dtype, dtype, dtype, dtype, dtype, E4M3, F32, width),
                {
                    "ACTIVATION": activation,
                    "BLOCK": power_of_two(width),
                    "num_warps": fp8_made.warps_for(width, fp8_made.HELD_OF_TWO),
                },
            )
    for block, width, double, transposed in itertools.product(
        (32, 64, 4096) if every else (64,), (4096, 592), (False, True), (False, True)
    ):
        absmax = (U8, F32, F32) if double else (F32, None, None)
        shape = {"BLOCK": block, "DOUBLE": double}
        name = f"fp8_nf4_rows {width} {block=} {double=} {transposed=}"
        if transposed:
            unit = fp8_nf4_launch.unit_for(width, block)
            config = fp8_nf4_launch.config_for(unit)
            shape |= {"UNIT": unit, "ROWS": config.rows, "RUNS": config.runs}
            yield Case(
                name,
                fp8_nf4_launch._columns_kernel,
                (U8, *absmax, F32, F32, F32, E4M3, 4096, width, 4096),
                shape | {"num_warps": config.num_warps},
            )
            continue
        shape |= {"LOOKUP": fp8_nf4_launch.LOOKUP, "TABLE": fp8_nf4_launch.table("nf4")}
        shape |= {"GROUPS": fp8_nf4_launch.THREADS, "WORDS": fp8_nf4_launch.words_for(width)}
        yield Case(
            name,
            fp8_nf4_launch._rows_kernel,
            (I32, *absmax, F32, F32, I32, 4096 * width, width),
            shape | {"num_warps": fp8_nf4_launch.THREADS // 32},
        )


def nf4_products_cases(every: bool) -> Iterator[Case]:
    """One weight, the three of attention, the two of a gated MLP."""
    kinds = (
        ((4096,), 4096, None, True),
        ((512,), 2048, None, False),
        ((4096, 1024, 1024), 4096, None, False),
        ((14336, 14336), 4096, "silu", False),
        ((14336, 14336), 4096, "gelu", False),
        ((4096,), 14336, None, True),
    )
    for (outputs, width, activation, added), rows, block, rank, dtype in itertools.product(
        kinds,
        (1, 4, 9, 32, 64) if every else (1, 8, 16, 64),
        (32, 64, 4096) if every else (64,),
        (0, 16) if every else (0,),
        (F16, BF16) if every else (BF16,),
    ):
        for double in (False, True) if every else (True,):
            unit = min(block, nf4_launch.UNIT)
            runs, total = width // unit, sum(outputs)
            config = nf4_products.config_for(rows, total, runs, bool(activation))
            absmax = (U8, F32, F32) if double else (F32, None, None)
            given = (I32, *absmax, None, dtype if rank else None)
            weights = [given if i < len(outputs) else (None,) * 6 for i in range(3)]
            ends = (dtype if rank else None, dtype if added else None, I32, F32, dtype)
            one = rows == 1
            sizes = (runs, *(*outputs, 0, 0)[:3])
            sizes = (*sizes, rank) if one else (rows, *sizes, total, rank, 0)
            yield Case(
                f"nf4_products {rows}x{width}x{outputs} {activation} {block=} {dtype} {double=} "
                f"{rank=}".replace(",", ""),
                nf4_row._row_kernel if one else nf4_tensor._products_kernel,
                (dtype, *itertools.chain(*weights), *ends, *sizes),
                nf4_products.options_for(
                    config, rows, runs, len(outputs), block, "nf4", dtype, activation, rank, double
                ),
            )


def rms_norm_cases(every: bool) -> Iterator[Case]:
    widths = (64, 128, 576, 1024, 2048, 3584, 4096, 5120, 8192, 16384)
    for width in widths if every else (128, 576, 2048, 4096, 8192):
        config = rms_norm_launch.config_for(width)
        shape = {"ROWS": config.rows, "BLOCK": config.block, "num_warps": config.num_warps}
        styles = ((False, False), (True, False)) + ((False, True),) * every
        for dtype, (gemma, layer) in itertools.product((F32, BF16) if every else (BF16,), styles):
            style = {"EPS": 1e-5, "OFFSET": float(gemma), "CAST_FIRST": not (gemma or layer)}
            style |= {"CENTERED": layer}
            for onto in (False, True):
                beside = (dtype if onto else None, dtype)
                yield Case(
                    f"rms_norm e={width} {dtype} {gemma=} {layer=} {onto=}",
                    rms_norm_launch._forward_kernel,
                    (dtype, dtype, *beside, F32, 16384, width, width, width),
                    {**style, **shape},
                )
                # In training the statistics are made again where a residual is added.
                yield Case(
                    f"rms_norm_backward e={width} {dtype} {gemma=} {layer=} {onto=}",
                    rms_norm_launch._backward_kernel,
                    (dtype, dtype, dtype, None if onto else F32, *beside, None)
                    + (16384, width, width, width, width, 1),
                    {"PARTIAL": False, "STAGES": 1, **style, **shape},
                )
            stages = rms_norm_launch.stages_for(config.block, dtype.itemsize)
            yield Case(
                f"rms_norm_backward e={width} {dtype} {gemma=} {layer=} dweight",
                rms_norm_launch._backward_kernel,
                (dtype, dtype, dtype, F32, None, dtype, F32, 16384, width, width, width, 0, 32),
                {"PARTIAL": True, "STAGES": stages, **style, **shape},
            )
        yield Case(
            f"rms_norm_sum e={width}",
            rms_norm_launch._sum_kernel,
            (F32, BF16, 264, width),
            {
                "ROWS": rms_norm_launch.SUM_ROWS,
                "COLUMNS": rms_norm_launch.SUM_COLUMNS,
                "num_warps": 4,
            },
        )


def rope_cases(every: bool) -> Iterator[Case]:
    shapes = ((32, 8, 64, 64), (32, 8, 128, 128), (16, 8, 256, 256), (9, 3, 64, 64), (8, 8, 80, 32))
    for heads, heads_k, dim, rot in shapes:
        config = rope_launch.config_for(heads, rot // 2)
        for dtype in (F32, BF16) if every else (BF16,):
            for normed, interleaved, inverse in itertools.product((False, True), repeat=3):
                raws = (dtype if normed and inverse else None,) * 2
                yield Case(
                    f"rope {heads}+{heads_k}x{dim}/{rot} {dtype} {normed=} {interleaved=}"
                    f" {inverse=}",
                    rope_launch._rope_kernel,
                    (dtype, dtype, *raws, *(dtype if normed else None,) * 2, F32, F32, dtype, dtype)
                    + (2048, heads, heads_k, dim, rot, 2048 * heads * dim, heads * dim, dim)
                    + (2048 * heads_k * dim, heads_k * dim, dim, 0),
                    {
                        "EPS": 1e-6,
                        "OFFSET": 0.0,
                        "CAST_FIRST": True,
                        "INTERLEAVED": interleaved,
                        "INVERSE": inverse,
                        "HEADS": config.heads,
                        "HALF": power_of_two(rot // 2),
                        "REST": 0 if rot == dim else power_of_two(dim - rot),
                        "num_warps": config.num_warps,
                    },
                )


def head_step_cases(every: bool, arch: int) -> Iterator[Case]:
    shapes = ((32, 8, 128, 128), (8, 4, 256, 256), (8, 8, 80, 32), (16, 1, 512, 512))
    for (heads, heads_k, dim, rot), normed, interleaved in itertools.product(
        shapes, (False, True), (False, True)
    ):
        for dtype in (F32, F16, BF16) if every else (BF16,):
            weights = (dtype, dtype) if normed else (None, None)
            for kept in (dtype, E4M3) if arch >= 89 else (dtype,):
                yield Case(
                    f"head_step {heads}+{heads_k}x{dim}/{rot} {dtype} {normed=} {interleaved=} "
                    f"{kept=}",
                    head_step._head_kernel,
                    (dtype, F32, F32, kept, kept, I64, *weights, dtype, heads, heads_k, rot),
                    {"EPS": 1e-5, "OFFSET": 0.0, "CAST_FIRST": True, "INTERLEAVED": interleaved}
                    | {"VALUE_EPS": 1e-6 if heads_k == 1 else None, "KEYS_AS_VALUES": heads_k == 1}
                    | {"NARROW": kept is E4M3, "DIM": dim, "WIDTH": power_of_two(dim)}
                    | {"num_warps": 1 if dim <= 128 else 2},
                )


def decode_attention_cases(every: bool, arch: int) -> Iterator[Case]:
    kept_as = [(0, None), (16, None)] + ([(16, E4M3)] if arch >= 89 else [])
    shapes = ((8, 4, 64), (8, 4, 128), (4, 2, 256), (2, 4, 512), (1, 7, 80))
    for (heads_k, groups, dim), dtype, softcap in itertools.product(
        shapes, (F32, F16, BF16) if every else (BF16,), (0.0, 50.0)
    ):
        if dim == 512 and softcap:  # which no model has
            continue
        extra = not softcap  # biases and sinks
        config = decode_attention.config_for(groups, dim, dtype)
        splits = decode_attention.splits_for(1, heads_k, 1024, config.block)
        width = max(16, power_of_two(dim))
        shape = {"DIM": dim, "SPLITS": splits, "num_warps": config.num_warps}
        piece = min(width, decode_attention.PIECE)
        for page, narrow in kept_as:
            kept = narrow or dtype
            yield Case(
                f"decode_attention {heads_k}x{groups}x{dim} {dtype} {softcap=} {page=} of {kept}",
                decode_attention._split_kernel,
                (dtype, kept, kept, I64, I64, F32, F32, F32, F32 if extra else None)
                + (I64 if page else None, 1024, heads_k, 1024, 64),
                {"SCALE": dim**-0.5, "SOFTCAP": softcap, "BIASED": extra, "PAGE": page}
                | {"GROUPS": groups, "ROWS": config.rows}
                | {"BLOCK": config.block, "WIDTH": width, "num_stages": config.num_stages, **shape},
            )
        yield Case(
            f"decode_attention_join {splits}x{dim} {dtype} sinks={extra}",
            decode_attention._join_kernel,
            (F32, F32, F32, F32 if extra else None, dtype, heads_k * groups),
            {"SINKS": extra, "PIECE": piece, **shape},
        )


def flash_cases(every: bool, arch: int) -> Iterator[Case]:
    """(heads, heads of keys, head dim) with: soft cap, window, packed rows, sinks and biases."""
    gemma, plain = (16, 8, 256), (8, 8, 128)
    kinds: list[tuple[Any, ...]] = [
        (gemma, 50.0, 0, False, False),
        ((64, 8, 64), 0.0, 128, True, True),
    ]
    if every:
        kinds += [(gemma, 50.0, 4096, True, False), ((64, 8, 64), 0.0, 0, False, True)]
        kinds += [(plain, 50.0, 4096, True, True), ((71, 1, 80), 0.0, 0, True, True)]
        kinds += [((8, 8, 256), 0.0, 4096, False, True), (plain, 0.0, 0, False, False)]
    for dtype, ((h, k, d), softcap, window, packed, extra) in itertools.product(
        (F16, BF16) if every else (BF16,), kinds
    ):
        configs = flash_launch.configs_for(d, arch // 10, 232_448 if arch >= 90 else 101_376)
        cu, sinks, bias = I32 if packed else None, F32 if extra else None, F32 if extra else None
        strides = (4096 * h * d, h * d, d, *(4096 * k * d, k * d, d) * 2)
        sizes = (4096, h, 4096 * extra, *strides)
        options = {"SCALE": d**-0.5, "SOFTCAP": softcap, "WINDOW": window, "PACKED": packed}
        options |= {"BIASED": extra, "GROUPS": h // k, "DIM": d, "WIDTH": power_of_two(d)}
        queries = (dtype,) * 5 + (F32, cu, bias, dtype, F32)
        keys = (dtype,) * 4 + (F32, F32, cu, bias, dtype, dtype)
        launches: list[tuple[Any, ...]] = [
            ("", flash._forward_kernel, (dtype,) * 3 + (cu, sinks, bias, dtype, F32)),
            ("_dq", flash._dq_kernel, queries),
            ("_dk", flash._dkv_kernel, keys),
            ("_dv", flash._dkv_kernel, keys),
        ]
        for (name, kernel, tensors), config in zip(launches, configs, strict=True):
            if config is None:
                continue
            more = {"SINKS": extra} if not name else {}
            if kernel is flash._dkv_kernel:
                more = {"DK": name == "_dk", "DV": name == "_dv" or configs.dv is None}
            yield Case(
                f"flash{name} {h}/{k}x{d} {softcap=} {window=} {packed=} {extra=} {dtype}",
                kernel,
                tensors + sizes,
                options | flash_launch._cut(config) | more,
            )


def short_conv_cases(every: bool) -> Iterator[Case]:
    """Rows of what published mixers convolve, in documents or not; LFM2's has no SiLU."""
    kinds = ((8192, 4, True, True), (6144, 4, True, False), (2048, 3, False, False))
    for (channels, kernel, silu, packed), dtype in itertools.product(
        kinds, (F32, F16, BF16) if every else (BF16,)
    ):
        starts, bias = U8 if packed else None, dtype if channels == 6144 else None
        shape = {"ROWS": short_conv.ROWS, "BLOCK": short_conv.BLOCK, "num_warps": short_conv.WARPS}
        style = {"SILU": silu, "KERNEL": kernel}
        sizes = (2048, channels, 2048 * channels, channels)
        name = f"{channels}x{kernel} {silu=} {packed=} {dtype}"
        for past in (None, dtype):
            yield Case(
                f"short_conv {name} past={past is not None}",
                short_conv._forward_kernel,
                (dtype, past, dtype, bias, starts, dtype, *sizes),
                style | shape,
            )
        for shares in (None, F32):
            yield Case(
                f"short_conv_backward {name} dw={shares is not None}",
                short_conv._backward_kernel,
                (dtype, dtype, dtype, bias, starts, dtype, shares, *sizes),
                style | shape | {"BLOCK": short_conv.PULLED},
            )
        yield Case(
            f"short_conv_step {name}",
            short_conv._step_kernel,
            (dtype, dtype, dtype, bias, starts, dtype, channels, channels),
            style | {"BLOCK": short_conv.STEP, "num_warps": short_conv.WARPS},
        )


def ssd_cases(every: bool) -> Iterator[Case]:
    """Heads of Granite 4 and of Falcon-H1's smaller and larger models, packed and not."""
    for (heads, groups, p, n), packed, dtype in itertools.product(
        ((48, 1, 64, 128), (24, 1, 64, 128), (24, 2, 128, 256)),
        (False, True),
        (F16, BF16) if every else (BF16,),
    ):
        starts = U8 if packed else None
        x, b = torch.empty(1, 1, heads, p, dtype=dtype), torch.empty(1, 1, groups, n, dtype=dtype)
        strides = (2048 * 8192, 8192) * 3
        configs = ssd.configs_for(p, n)
        times = (F32, F32)
        states = (dtype, dtype, *times, starts, F32 if packed else None, dtype)
        into = (dtype, dtype, dtype, dtype, *times)
        more = (F32, starts, dtype, dtype)
        launches: list[tuple[str, Kernel, tuple[Any, ...], ssd.Config, dict[str, Any]]] = [
            ("out", ssd_scan._out_kernel, (*into[1:], *more), configs.out, {}),
            ("dx", ssd_scan._dx_kernel, (*into, *more, dtype, F32, F32, F32), configs.dx, {}),
            (
                "dbc",
                ssd_scan._dbc_kernel,
                (*into, *more[1:], F32, F32),
                configs.dbc,
                {"SPLITS": 2},
            ),
        ]
        for name, last, backward in (("states", F32, False), ("pulls", None, True)):
            args = (*states, last), configs.states, {"BACKWARD": backward}
            launches.append((name, ssd_scan._states_kernel, *args))
        for name, kernel, tensors, config, more in launches:
            sizes = (2048, heads, *strides[: 4 if name in ("states", "pulls") else 6])
            yield Case(
                f"ssd_{name} {heads}/{groups}x{p}x{n} {packed=} {dtype}",
                kernel,
                tensors + sizes,
                ssd._options(x, b, config, ssd.CHUNK) | more,
            )


def delta_cases(every: bool) -> Iterator[Case]:
    """Qwen3-Next's heads, packed and not."""
    heads, groups, d = 32, 16, 128
    for packed, dtype in itertools.product((False, True), (F16, BF16) if every else (BF16,)):
        starts, first = U8 if packed else None, F32 if packed else None
        k, v = (torch.empty(1, 1, h, d, dtype=dtype) for h in (groups, heads))
        configs, step, sizes = delta_launch.configs_for(d), (2048 * 8192, 8192), (2048, heads)
        one, two, three, rates = (dtype,), (dtype,) * 2, (dtype,) * 3, (F32, F32, starts)
        known, ends = (F32, starts), (F32, F32)
        launches: list[tuple[str, Kernel, tuple[Any, ...], int, bool]] = [
            ("solve", delta_scan._solve_kernel, (*one, *rates, *one), 1, False),
            (
                "states",
                delta_scan._states_kernel,
                (*two, *rates, *one, first, *two, F32),
                2,
                True,
            ),
            ("out", ssd_scan._out_kernel, (*three, F32, None, None, starts, *two), 3, False),
            ("local", delta_scan._local_kernel, (*three, *known, *one), 2, False),
            ("pulls", delta_scan._pulls_kernel, (*two, *two, *rates, *three), 2, True),
            ("dq", delta_scan._dq_kernel, (*two, *two, *known, *two, F32), 2, True),
            (
                "dk",
                delta_scan._dk_kernel,
                (*three, *three, *rates, *two, F32, *two, *ends),
                3,
                True,
            ),
        ]
        for name, kernel, tensors, strides, width in launches:
            options = delta_launch._options(k, v, getattr(configs, name), width=width)
            if name == "solve":
                del options["P"], options["TILE_P"]
            yield Case(
                f"delta_{name} {heads}/{groups}x{d} {packed=} {dtype}",
                kernel,
                tensors + sizes + step * strides,
                options,
            )


def state_step_cases(every: bool) -> Iterator[Case]:
    """Granite 4's and Falcon-H1's states, and Qwen3-Next's."""
    for (heads, groups, p, n), dtype in itertools.product(
        ((48, 1, 64, 128), (24, 2, 128, 256)), (F32, F16, BF16) if every else (BF16,)
    ):
        yield Case(
            f"ssd_step {heads}/{groups}x{p}x{n} {dtype}",
            state_step._ssd_kernel,
            (dtype,) * 7 + (None, F32, dtype, 0.0, float("inf"), heads) + (8192,) * 4,
            state_step._options(p, n, heads // groups),
        )
    for dtype in (F32, F16, BF16) if every else (BF16,):
        yield Case(
            f"delta_step 32/16x128x128 {dtype}",
            state_step._delta_kernel,
            (dtype,) * 7 + (None, F32, dtype, 32) + (8192,) * 5,
            {"SCALE": 128**-0.5, "ROUND": 1e-6, **state_step._options(128, 128, 2)},
        )


def gated_norm_cases(every: bool) -> Iterator[Case]:
    """Heads of a delta net, Mamba 2 whole and in groups, and without a norm."""
    kinds = ((32, 128, True, True), (1, 3072, False, False), (8, 1024, False, True))
    for (groups, width, shared, first), wide, dtype in itertools.product(
        (*kinds, (1, 8192, None, False)), (False, True), (F32, F16, BF16) if every else (BF16,)
    ):
        rows, block, warps = gated_norm.config_for(width)
        weight = None if shared is None else dtype
        options = {"EPS": 1e-6, "NORM_FIRST": first, "SHARED": bool(shared), "WIDTH": width}
        options |= {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        y, sizes = F32 if wide else dtype, (8192 * groups, groups, 12288)
        yield Case(
            f"gated_norm {groups}x{width} {shared=} {first=} {wide=} {dtype}",
            gated_norm._forward_kernel,
            (y, dtype, weight, dtype, *sizes),
            options,
        )
        yield Case(
            f"gated_norm_backward {groups}x{width} {shared=} {first=} {wide=} {dtype}",
            gated_norm._backward_kernel,
            (dtype, y, dtype, weight, y, dtype, *sizes),
            options,
        )


def other_cases(every: bool) -> Iterator[Case]:
    count = 16384 * 14336
    for activation, dtype in itertools.product(gated.ACTIVATIONS, (F32, F16, BF16)):
        options = {"ACTIVATION": activation, "BLOCK": gated.BLOCK, "num_warps": gated.WARPS}
        yield Case(
            f"gated {activation} {dtype}",
            gated._forward_kernel,
            (dtype, dtype, dtype, count),
            options,
        )
        for name, remake in (("gated_backward", False), ("gated_pull", True)):
            yield Case(
                f"{name} {activation} {dtype}",
                gated._backward_kernel,
                (dtype,) * 5 + (count,),
                options | {"REMAKE": remake},
            )
    for dtype in (F32, F16, BF16):
        options = {"BLOCK": gated.BLOCK, "num_warps": gated.WARPS}
        for name, kernel, tensors in (
            ("clamped", clamped._forward_kernel, 3),
            ("clamped_backward", clamped._backward_kernel, 5),
        ):
            args = (dtype,) * tensors + (count, 1.702, 7.0)
            yield Case(f"{name} {dtype}", kernel, args, options)
    plain, options = (None, 0.0, 0.0), (F32, 0.1, 1e-4)
    for dtype, softcap, gradient, (weights, smoothing, z_loss) in itertools.product(
        (F32, BF16), (0.0, 30.0), (False, True), (plain, options)
    ):
        yield Case(
            f"cross_entropy {dtype} {softcap=} {gradient=} {smoothing=} {z_loss=}",
            cross_entropy_rows._row_kernel,
            (dtype, I64, weights, F32, 128256, -100, 128256),
            {
                "SCALE": 1.0,
                "SOFTCAP": softcap,
                "SMOOTHING": smoothing,
                "Z_LOSS": z_loss,
                "GRADIENT": gradient,
                "BLOCK": cross_entropy_rows.BLOCK,
                "num_warps": cross_entropy_rows.WARPS,
            },
        )


def cases(every: bool, arch: int) -> Iterator[Case]:
    """Every kernel over the configurations it is launched with; `every` adds dtypes and shapes, and
    every kernel with all its numbers 1, which Triton takes for constants.
    """
    seen = set()
    for case in launched(every, arch):
        yield case
        if every and case.kernel not in seen:
            ones = tuple(1 if type(arg) is int else arg for arg in case.args)
            yield case._replace(name=f"{ONES}{case.name}", args=ones)
            seen.add(case.kernel)


def launched(every: bool, arch: int) -> Iterator[Case]:
    if arch >= 89:
        yield from fp8_cases(every)
    yield from flash_cases(every, arch)
    yield from low_rank_cases(every, arch)
    yield from weighted_rows_cases(every)
    yield from dropout_cases(every)
    yield from nf4_cases(every)
    yield from nf4_matvec_cases(every)
    yield from grouped_cases(every, arch)
    yield from nf4_products_cases(every)
    yield from rms_norm_cases(every)
    yield from rope_cases(every)
    yield from head_step_cases(every, arch)
    yield from decode_attention_cases(every, arch)
    yield from short_conv_cases(every)
    yield from ssd_cases(every)
    yield from gated_norm_cases(every)
    yield from state_step_cases(every)
    yield from delta_cases(every)
    yield from other_cases(every)


def spread(found: Iterator[Case], most: int = 4) -> Iterator[Case]:
    """Of each kernel at most so many of its cases, from its first to its last."""
    by_name: dict[str, list[Case]] = {}
    for case in found:
        by_name.setdefault(case.name.split()[0], []).append(case)
    for of in by_name.values():
        count = min(most, len(of))
        yield from (of[i * (len(of) - 1) // max(count - 1, 1)] for i in range(count))


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread) of a cubin's kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def main(arch: int, every: bool, few: bool) -> int:
    """1 if one of them did not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Enough of a driver to compile, never to launch."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    failed = 0
    found = cases(every, arch)
    for case in spread(found) if few else found:
        try:
            row = compiled(case)
        except Exception as error:  # whatever a compiler raises: the others are to be seen too
            failed += 1
            print(f"{case.name}: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
            continue
        print(case.name, *row, sep=",")
    return 1 if failed else 0


def compiled(case: Case) -> tuple[int, int, int, int, int]:
    """Registers, stack bytes, shared memory, widest access, whether a product and a sum are fused
    that must not be.
    """
    exact = case.kernel in EXACT
    made = case.kernel.jitted.warmup(
        *case.args, **case.options, enable_fp_fusion=not exact, grid=(1,)
    )
    registers, stack = resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    widest = max(
        (
            4 * int(v or 1) * int(b) // 32
            for v, b in re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
        ),
        default=0,
    )
    # GPUs before Hopper multiply bf16 by adding to -0.
    fused = exact and bool(re.search(r"\bfma\.(?!rn\.bf16)", ptx))
    return registers, stack, made.metadata.shared, widest, int(fused)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), "--all" in sys.argv, "--few" in sys.argv))
