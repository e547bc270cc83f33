"""How `flash`'s kernels are cut and launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from .flash import _dkv_kernel, _dq_kernel, _forward_kernel
from .launch import ceil_div, operator, power_of_two

# The head dims that the kernels take.
DIMS = range(16, 257)


class Config(NamedTuple):
    """How one launch is cut: queries and keys of a tile, warps, stages of the pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """The cut of every launch; `dv` None: one launch makes dk and dv. Two make the scores twice,
    but each has the registers for larger tiles of one sum.
    """

    forward: Config
    dq: Config
    dk: Config
    dv: Config | None = None


# Bytes of shared memory of a program that all but the first of these need; the first fits the 99 KB
# that every GPU of capability 8 has, and some newer ones.
LARGE = 232_448
_SMALL, _HOPPER, _BLACKWELL = 8, 9, 10

# By generation and padded head dim: the fastest of those tried on a Hopper, some spills included.
CONFIGS = {
    (_SMALL, 64): Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(32, 64, 8, 2)),
    (_SMALL, 128): Configs(Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
    (_SMALL, 256): Configs(
        Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2)
    ),
    (_HOPPER, 64): Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    (_HOPPER, 128): Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 128, 8, 2)),
    (_HOPPER, 256): Configs(
        Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(32, 128, 8, 3), Config(32, 64, 4, 2)
    ),
}
CONFIGS |= {(_BLACKWELL, dim): CONFIGS[_HOPPER, dim] for dim in (64, 128)}
CONFIGS[_BLACKWELL, 256] = CONFIGS[_HOPPER, 256]._replace(dk=Config(32, 128, 8, 2))


def configs_for(dim: int, major: int, shared: int) -> Configs:
    """The cuts for heads of `dim` features on a GPU of compute capability `major` where a program
    may have `shared` bytes of shared memory.
    """
    generation = min(major, _BLACKWELL) if shared >= LARGE else _SMALL
    return CONFIGS[generation, max(64, power_of_two(dim))]


def _configs(q: Tensor) -> Configs:
    if not q.is_cuda:
        return configs_for(q.shape[-1], _HOPPER, LARGE)
    properties: Any = torch.cuda.get_device_properties(q.device)
    return configs_for(q.shape[-1], properties.major, properties.shared_memory_per_block_optin)


def _even(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The sizes and strides, and the options, that all three kernels take."""
    _, s, h, d = q.shape
    columns = 0 if bias is None else bias.shape[1]
    sizes = (s, h, columns, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    options = {
        "SCALE": scale,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "PACKED": cu_seqlens is not None,
        "BIASED": bias is not None,
        "GROUPS": h // k.shape[2],
        "DIM": d,
        "WIDTH": max(16, power_of_two(d)),
    }
    return sizes, options


def _cut(config: Config) -> dict[str, int]:
    return {
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _rows(q: Tensor, cu_seqlens: Tensor | None, longest: int) -> tuple[int, int]:
    """Rows or documents, and the length of the longest."""
    return (q.shape[0], q.shape[1]) if cu_seqlens is None else (cu_seqlens.numel() - 1, longest)


def check(q: Tensor, cu_seqlens: Tensor | None, longest: int, bias: Tensor | None) -> None:
    """Raises KernelError for what the kernels cannot take."""
    if q.shape[-1] not in DIMS:
        raise KernelError(f"heads of {q.shape[-1]} features: expected 16 to 256")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise KernelError(f"documents in {q.shape[0]} rows: expected one packed row")
    if bias is not None:
        longest = q.shape[1] if cu_seqlens is None else longest
        if bias.shape[0] != q.shape[2] or bias.shape[1] < longest:
            raise KernelError(
                f"bias {list(bias.shape)}: expected a row for each of {q.shape[2]} heads and a "
                f"column for each of {longest} keys"
            )


@operator(
    "flash_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int longest, Tensor? sinks,"
    " Tensor? bias, float scale, float softcap, int window) -> (Tensor, Tensor)",
    fake=lambda q, *_: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
    ),
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    check(q, cu_seqlens, longest, bias)
    b, s, h, _ = q.shape
    q, k, v = _even(q), _even(k), _even(v)
    config = _configs(q).forward
    rows, longest = _rows(q, cu_seqlens, longest)
    # Tokens behind the last document are nobody's.
    new = q.new_empty if cu_seqlens is None else q.new_zeros
    out, lse = new(q.shape), new((b, h, s), dtype=torch.float32)
    sizes, options = _shared(q, k, v, cu_seqlens, bias, scale, softcap, window)
    _forward_kernel(
        (ceil_div(longest, config.queries), h, rows),
        q,
        k,
        v,
        cu_seqlens,
        sinks,
        bias,
        out,
        lse,
        *sizes,
        SINKS=sinks is not None,
        **options,
        **_cut(config),
    )
    return out, lse


@operator(
    "flash_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? cu_seqlens, int longest, Tensor? bias, float scale, float softcap, int window)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, cu_seqlens, longest, bias)
    q, k, v, dout, out = _even(q), _even(k), _even(v), dout.contiguous(), out.contiguous()
    configs = _configs(q)
    rows, longest = _rows(q, cu_seqlens, longest)
    new = q.new_empty if cu_seqlens is None else q.new_zeros
    dq, dk, dv = new(q.shape), new(k.shape), new(v.shape)
    delta = lse.new_empty(lse.shape)
    sizes, options = _shared(q, k, v, cu_seqlens, bias, scale, softcap, window)
    _dq_kernel(
        (ceil_div(longest, configs.dq.queries), q.shape[2], rows),
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        bias,
        dq,
        delta,
        *sizes,
        **options,
        **_cut(configs.dq),
    )
    keys = ((configs.dk, True, configs.dv is None), (configs.dv, False, True))
    for config, want_dk, want_dv in keys:
        if config is None:
            continue
        _dkv_kernel(
            (ceil_div(longest, config.keys), k.shape[2], rows),
            dout,
            q,
            k,
            v,
            lse,
            delta,
            cu_seqlens,
            bias,
            dk,
            dv,
            *sizes,
            DK=want_dk,
            DV=want_dv,
            **options,
            **_cut(config),
        )
    return dq, dk, dv
