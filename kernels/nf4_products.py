"""Products of a few rows with several 4-bit weights in one launch, as a step of decoding has them.

q, k and v read one input, and gate and up another, whose outputs an activation joins; o and down
are added to the residual stream. Each of the three is one launch here (nf4_tensor.py). Forward
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from . import codebook, nf4, nf4_decode, nf4_row
from .gated import ACTIVATIONS
from .launch import Kernel, ceil_div, operator, ops, power_of_two
from .nf4_launch import UNIT
from .nf4_tensor import _products_kernel

MOST_ROWS = 64
MOST_PARTS = 3
ENOUGH = 2112  # warps of a product of one row: 16 a multiprocessor


class Config(NamedTuple):
    """How a launch is cut: the warps of a program, which share its inputs, and how many runs a warp
    takes a step.
    """

    num_warps: int
    turns: int


def config_for(rows: int, outputs: int, runs: int, pair: bool) -> Config:
    """The cut for `rows` of x, `outputs` in all and `runs` of weights each, from what
    examples/measurements/decode_h100.md measured; `pair`: two weights under an activation.
    """
    if rows == 1:
        # Warps share outputs where programs of one would be too few; each takes eight runs a step.
        programs = ceil_div(outputs, 2 * nf4_row.SIDE if pair else nf4_row.SIDE)
        warps = power_of_two(ceil_div(ENOUGH // 2 if pair else ENOUGH, programs))
        warps = max(1, min(warps, 8, power_of_two(runs) // 8))
        return Config(warps, 2 if pair and warps == 1 and runs >= 16 else 1)
    eighths = power_of_two(ceil_div(rows, 8))
    if pair or eighths > 4 or (eighths == 4 and outputs > 4096):
        warps = 4
    else:
        warps = 16 if runs >= 128 and eighths == 1 else 8
    many = (eighths > 2 and pair) or (eighths > 4 and outputs > 4096)
    return Config(min(warps, power_of_two(runs)), 1 if many else 2)


def options_for(
    config: Config,
    rows: int,
    runs: int,
    parts: int,
    block: int,
    kind: str,
    dtype: torch.dtype,
    activation: str | None,
    rank: int,
    double: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    step = config.num_warps * config.turns
    own: dict[str, Any] = {"SHUFFLES": nf4_decode.SHUFFLES}
    if rows == 1:
        step *= 8
    else:
        own = {"FRAGMENTS": nf4_decode.FRAGMENTS, "EIGHTS": power_of_two(ceil_div(rows, 8))}
    return own | {
        "BLOCK": block,
        "WIDTH": min(block, UNIT),
        "WARPS": config.num_warps,
        "TURNS": config.turns,
        "PARTS": 1 if activation else parts,
        "ACTIVATION": activation or None,
        "RANK": max(16, power_of_two(rank)) if rank else 0,
        "DOUBLE": double,
        "UNSCALE": 1.0 / nf4_decode.SCALES[kind, dtype],
        "RESIDUAL": 1.0,
        "WHOLE": runs % step == 0,
        "num_warps": config.num_warps,
        "num_stages": 1,
    }


class Weight(NamedTuple):
    """One 4-bit weight [outputs, in] of a launch: its parts as `nf4.dequantize` takes them, a bias
    [outputs] and the second factor [outputs, r] of a low-rank term.
    """

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    outputs: int
    bias: Tensor | None = None
    b: Tensor | None = None


def products(
    x: Tensor,
    weights: Sequence[Weight],
    block: int,
    kind: str = "nf4",
    *,
    low: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """x [m, in] in 16 bits times the transposes of up to three weights, side by side [m, outputs];
    with an `activation`, act(first) * second of two weights. residual [m, outputs]: what
    residual_scale times the result is added to. low [m, parts * r] times each weight's b is added
    to its product. All in fp32, rounded once, in the dtype of x.

    A launch alone: for a GPU, or the interpreter. Raises KernelError for what does not fit, for
    more than 64 rows, and where x needs a gradient.
    """
    _check(x, weights, block, kind, low, activation, residual)

    def every(tensors: list[Any]) -> list[Tensor]:
        return [t for t in tensors if t is not None]

    out: Tensor = ops.nf4_products(
        x,
        [w.packed for w in weights],
        [w.absmax for w in weights],
        every([w.absmax_scale for w in weights]),
        every([w.absmax_offset for w in weights]),
        every([w.bias for w in weights]),
        low,
        every([w.b for w in weights]),
        residual,
        [w.outputs for w in weights],
        block,
        kind,
        activation or "",
        residual_scale,
    )
    return out


def _check(
    x: Tensor,
    weights: Sequence[Weight],
    block: int,
    kind: str,
    low: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16):
        raise KernelError(f"x is {x.dtype} {list(x.shape)}: expected [rows, in] in 16 bits")
    if torch.is_grad_enabled() and x.requires_grad:
        raise KernelError("x needs a gradient: this product has none, use quant.linear")
    rows, width = x.shape
    if not 1 <= rows <= MOST_ROWS or width % min(block, UNIT):
        raise KernelError(
            f"x {list(x.shape)} in blocks of {block}: expected 1 to {MOST_ROWS} rows of a multiple "
            f"of {min(block, UNIT)} values"
        )
    if not 1 <= len(weights) <= MOST_PARTS:
        raise KernelError(f"{len(weights)} weights: expected 1 to {MOST_PARTS} weights")
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise KernelError(f"activation {activation!r}: expected one of {known}")
    sizes = [w.outputs for w in weights]
    if activation is not None and (len(sizes) != 2 or sizes[0] != sizes[1]):
        raise KernelError(f"{sizes} outputs: an activation joins two weights of one shape")
    for w in weights:
        nf4._check_parts(
            w.packed, w.absmax, w.absmax_scale, w.absmax_offset, w.outputs * width, block
        )
    for name, given in (
        ("absmax_scale", [w.absmax_scale is not None for w in weights]),
        ("bias", [w.bias is not None for w in weights]),
        ("b", [w.b is not None for w in weights]),
    ):
        if any(given) != all(given):
            raise KernelError(f"{name}: all or none of the weights have one")
    ranks = {w.b.shape[1] for w in weights if w.b is not None}
    wanted = None if not ranks else (rows, len(weights) * max(ranks))
    if len(ranks) > 1 or wanted != (None if low is None else low.shape):
        raise KernelError(
            f"low {None if low is None else list(low.shape)} for ranks {sorted(ranks)}: expected "
            f"{wanted}, of one rank"
        )
    columns = sizes[0] if activation else sum(sizes)
    if residual is not None and (residual.shape != (rows, columns) or residual.dtype != x.dtype):
        raise KernelError(
            f"residual {residual.dtype} {list(residual.shape)}: expected {x.dtype} "
            f"[{rows}, {columns}]"
        )


def _fake(x: Tensor, *rest: Any) -> Tensor:
    outputs, activation = rest[8], rest[11]
    return x.new_empty((x.shape[0], outputs[0] if activation else sum(outputs)))


@operator(
    "nf4_products(Tensor x, Tensor[] packed, Tensor[] absmax, Tensor[] absmax_scale,"
    " Tensor[] absmax_offset, Tensor[] bias, Tensor? low, Tensor[] b, Tensor? residual,"
    " int[] outputs, int block, str kind, str activation, float residual_scale) -> Tensor",
    fake=_fake,
)
def _launch_products(
    x: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    absmax_scale: list[Tensor],
    absmax_offset: list[Tensor],
    bias: list[Tensor],
    low: Tensor | None,
    b: list[Tensor],
    residual: Tensor | None,
    outputs: list[int],
    block: int,
    kind: str,
    activation: str,
    residual_scale: float,
) -> Tensor:
    rows, width = x.shape
    unit = min(block, UNIT)
    runs, parts = width // unit, len(packed)
    config = config_for(rows, sum(outputs), runs, bool(activation))
    columns = outputs[0] if activation else sum(outputs)
    out = x.new_empty((rows, columns))
    rank = b[0].shape[1] if b else 0

    def of(tensors: Sequence[Tensor], i: int) -> Tensor | None:
        return tensors[i] if i < len(tensors) else None

    each = []
    words = [_aligned(t).view(torch.int32) for t in packed]
    terms = [t.to(x.dtype).contiguous() for t in b]
    for i in range(MOST_PARTS):
        tensors = (words, absmax, absmax_scale, absmax_offset, bias, terms)
        each += [of(ts, i) for ts in tensors]
    one = rows == 1
    tiles = [ceil_div(n, nf4_row.SIDE if one else 16) for n in outputs]
    kernel: Kernel = nf4_row._row_kernel if one else _products_kernel
    kernel(
        (tiles[0] if activation else sum(tiles),),
        _aligned(x),
        *each,
        None if low is None else low.to(x.dtype).contiguous(),
        None if residual is None else residual.contiguous(),
        (nf4_decode.lanes if one else nf4_decode.table)(kind, x.dtype, x.device),
        codebook.device_tables(x.device, kind).dynamic,
        out,
        *(() if one else (rows,)),
        runs,
        *(outputs + [0] * (MOST_PARTS - parts)),
        *((rank,) if one else (columns, rank, 0)),
        **options_for(
            config, rows, runs, parts, block, kind, x.dtype, activation, rank, bool(absmax_scale)
        )
        | {"RESIDUAL": residual_scale},
    )
    return out


def _aligned(t: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as wide accesses want it; a copy where it must."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
