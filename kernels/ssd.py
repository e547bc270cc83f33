"""Mamba 2's scan over the backend that serves: `ssd_scan`'s kernels, or the plain-torch reference.

The math is `ssd_reference`'s, with the factor dt of what is taken up and the skip D x.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from . import ssd_reference as reference
from . import ssd_scan, token_heads
from .launch import apply, ceil_div, on_gpu, once, operator, ops, power_of_two

Backend = Literal["triton", "reference"]
# Tokens of a chunk. What is kept between chunks shrinks with it, and what is done in one grows.
CHUNK = 64
# The widest heads and states of the launches, whose tiles hold a chunk of a whole head.
WIDEST = (128, 256)
# Programs that fill a GPU while the heads of a group are summed.
FILLED = 512


class Config(NamedTuple):
    """Tiles of a head's features and of its state's, warps, and loads in flight."""

    p: int
    n: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    states: Config
    out: Config
    dx: Config
    dbc: Config


def configs_for(p: int, n: int) -> Configs:
    """For heads of p features with states of n."""
    wide, deep = max(16, power_of_two(p)), min(64, max(16, power_of_two(n)))
    big = wide > 64
    # Of the backward's launches the fastest are not all to be trusted: for Hopper, Triton before
    # 3.7.1 has wrong code for some products of a transposed sum in 4 warps. These were checked.
    return Configs(
        states=Config(min(wide, 64), deep, 4, 3),
        out=Config(wide, deep, 8 if big else 4, 2),
        dx=Config(wide, deep, 8, 2),
        dbc=Config(wide, min(32, deep), 8, 2) if big else Config(wide, deep, 8, 2),
    )


def backend_for(x: Tensor, b: Tensor) -> Backend:
    """Which backend runs heads x [b, s, h, p] with b [b, s, g, n]: of device, dtype and shape."""
    small = x.shape[-1] <= WIDEST[0] and b.shape[-1] <= WIDEST[1]
    if small and x.dtype in (torch.bfloat16, torch.float16) and on_gpu(x):
        return "triton"
    return "reference"


def ssd(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """x [b, s, h, p], dt and decay (at most 0) fp32 [b, s, h], b and c [b, s, g, n], d fp32 [h] ->
    y [b, s, h, p] and, with `before`, the last state fp32 [b, h, p, n].

    starts bool [b, s] and before [b, h, p, n] as in `ssd_reference.scan`. y is fp32 from the
    reference, which computes in it (fp64 of wider inputs), and of x's dtype from the launches,
    whose products are of that dtype and whose sums fp32. Differentiable in all but `starts`.
    """
    if x.shape[2] % b.shape[2] or b.shape != c.shape or x.shape[:3] != dt.shape:
        raise KernelError(
            f"x {list(x.shape)}, dt {list(dt.shape)}, b {list(b.shape)} and c {list(c.shape)} do "
            "not belong together: expected [b, s, h, p], [b, s, h] and twice [b, s, g, n] with h a "
            "multiple of g"
        )
    # The launches have no gradients of and through states.
    graph = before is not None and torch.is_grad_enabled() and before.requires_grad
    one = x.shape[1] == 1 and before is not None
    launches = on_gpu(x, dt, decay, b, c, d, starts, before) and backend_for(x, b) == "triton"
    if launches and not graph and not one:
        y, last = apply(_SSD, x, dt, decay, b, c, d, starts, before)
        return y, None if before is None else last
    wide = torch.promote_types(x.dtype, torch.float32)
    x, b, c = (t.to(wide) for t in (x, b, c))
    taken = x * dt[..., None], decay, b, c, starts
    if before is None:
        y, last = reference.scan(*taken, None)[0], None
    else:
        y, last = (reference.step if one else reference.scan)(*taken, before)
    return y + x * d[:, None], last


def rates(
    dt: Tensor, dt_bias: Tensor, a_log: Tensor, limits: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Raw steps [b, s, h], dt_bias and a_log [h] -> dt within limits and decays [b, s, h] in fp32
    or wider: softplus(dt + dt_bias) and -exp(a_log) dt.
    """
    wide = torch.promote_types(dt.dtype, torch.float32)
    dt = F.softplus(dt.to(wide) + dt_bias.to(wide)).clamp(*limits)
    return dt, dt * -a_log.to(wide).exp()


class _SSD(torch.autograd.Function):
    """y and the last state, which has no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        dt: Tensor,
        decay: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        starts: Tensor | None,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, last = ops.ssd(x, dt, decay, b, c, d, starts, before)
        return y, last

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        grads = once(ops.ssd_backward, dy, *ctx.saved_tensors)
        return *grads, None, None


def _options(x: Tensor, b: Tensor, config: Config, chunk: int) -> dict[str, Any]:
    return {
        "P": x.shape[3],
        "N": b.shape[3],
        "SHARE": x.shape[2] // b.shape[2],
        "CHUNK": chunk,
        "TILE_P": config.p,
        "TILE_N": config.n,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _states(
    x: Tensor,
    b: Tensor,
    decay: Tensor,
    dt: Tensor,
    flags: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    config: Config,
    chunk: int,
    backward: bool,
) -> Tensor:
    """[b, chunks, h, p, n] in x's dtype."""
    rows, s, heads, p = x.shape
    n = b.shape[3]
    states = x.new_empty((rows, ceil_div(s, chunk), heads, p, n))
    ssd_scan._states_kernel(
        (ceil_div(p, config.p) * ceil_div(n, config.n), heads, rows),
        x, b, decay, dt, flags, first, states, last, s, heads, *token_heads.steps(x, b),
        BACKWARD=backward, **_options(x, b, config, chunk),
    )  # fmt: skip
    return states


def _made(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, s, heads, p = x.shape
    return x.new_empty(x.shape), decay.new_empty((rows, heads, p, b.shape[3]))


@operator(
    "ssd(Tensor x, Tensor dt, Tensor decay, Tensor b, Tensor c, Tensor d, Tensor? starts,"
    " Tensor? before) -> (Tensor, Tensor)",
    fake=_made,
)
def _launch_forward(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, s, heads, p = x.shape
    y, last = _made(x, dt, decay, b)
    x, b, c = token_heads.side_by_side(x, b, c)
    dt, decay, d, flags = (
        dt.contiguous(),
        decay.contiguous(),
        d.contiguous(),
        token_heads.flags(starts),
    )
    first = None if before is None else before.contiguous()
    configs = configs_for(p, b.shape[3])
    states = _states(x, b, decay, dt, flags, first, last, configs.states, CHUNK, False)
    ssd_scan._out_kernel(
        (heads, ceil_div(s, CHUNK), rows),
        x, b, c, decay, dt, d, flags, states, y, s, heads, *token_heads.steps(x, b, c),
        **_options(x, b, configs.out, CHUNK),
    )  # fmt: skip
    return y, last


def _gradients(dy: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:6] if t is not None)


@operator(
    "ssd_backward(Tensor dy, Tensor x, Tensor dt, Tensor decay, Tensor b, Tensor c, Tensor d,"
    " Tensor? starts, Tensor? before) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def _launch_backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, s, heads, p = x.shape
    groups, n = b.shape[2:]
    x, b, c = token_heads.side_by_side(x, b, c)
    dy, dt, decay, d = (t.contiguous() for t in (dy, dt, decay, d))
    flags, first = token_heads.flags(starts), None if before is None else before.contiguous()
    configs, chunks = configs_for(p, n), ceil_div(s, CHUNK)
    # Made again: kept, they would be twice as large as x.
    states = _states(x, b, decay, dt, flags, first, None, configs.states, CHUNK, False)
    pulls = _states(dy, c, decay, dt, flags, None, None, configs.states, CHUNK, True)
    dx, ddt, ddecay = x.new_empty(x.shape), torch.empty_like(dt), torch.empty_like(decay)
    shares = decay.new_empty((rows, chunks, heads))
    ssd_scan._dx_kernel(
        (heads, chunks, rows),
        dy, x, b, c, decay, dt, d, flags, states, pulls, dx, ddt, ddecay, shares,
        s, heads, *token_heads.steps(x, b, c),
        **_options(x, b, configs.dx, CHUNK),
    )  # fmt: skip
    tiles = ceil_div(n, configs.dbc.n) * groups
    splits = min(heads // groups, ceil_div(FILLED, tiles * chunks * rows))
    db, dc = decay.new_empty((2, splits, *b.shape)).unbind(0)
    ssd_scan._dbc_kernel(
        (tiles * splits, chunks, rows),
        dy, x, b, c, decay, dt, flags, states, pulls, db, dc, s, heads, *token_heads.steps(x, b, c),
        SPLITS=splits, **_options(x, b, configs.dbc, CHUNK),
    )  # fmt: skip
    db, dc = (t.sum(0).to(b.dtype) for t in (db, dc))
    return dx, ddt, ddecay, db, dc, shares.sum((0, 1)).to(d.dtype)
