"""The tolerance rule: how close is close enough, with float64 as the truth and eager torch as the
yardstick.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at |exact|, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.double().abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps, dtype=torch.float64), exponent)


def assert_elementwise(ours: Tensor, eager: Tensor, exact: Tensor, *, pooled: bool = False) -> None:
    """Per element |ours - exact| <= 2 |eager - exact| + 1 ulp(exact); non-finite values agree
    exactly.

    `pooled` takes for the eager error of every element the largest of the tensor, in ulps: for
    functions that no library rounds correctly (exp, erf), where a single eager value may be right
    by luck.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape == exact.shape
    exact = exact.double()
    unit = ulp(torch.nan_to_num(exact, 0.0, 0.0, 0.0), ours.dtype)
    finite = exact.isfinite() & eager.double().isfinite()
    same = (ours == eager) | (ours.isnan() & eager.isnan())
    assert bool((finite | same).all()), "non-finite values differ from eager's"
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (ours.double() - exact).abs() / unit, zero)
    yard = torch.where(finite, (eager.double() - exact).abs() / unit, zero)
    if pooled and yard.numel():
        yard = yard.max().expand_as(yard)
    excess = error - (2 * yard + 1)
    # A NaN of ours compares false and must not pass.
    assert bool((excess <= 0).all()), (
        f"{int((~(excess <= 0)).sum())} of {ours.numel()} values off, worst error "
        f"{float(error.nan_to_num(float('inf')).max()):.3g} ulp, eager's {float(yard.max()):.3g}"
    )


def assert_rows(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Over each row (last dim): max|ours - exact| <= 2 max|eager - exact| + eps(dtype)
    max|exact|.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape == exact.shape
    if ours.numel() == 0:
        return
    ours_, eager_, exact_ = (
        t.detach().double().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (ours, eager, exact)
    )
    error = (ours_ - exact_).abs().amax(1)
    limit = 2 * (eager_ - exact_).abs().amax(1)
    limit += torch.finfo(ours.dtype).eps * exact_.abs().amax(1)
    # A NaN of ours compares false and must not pass.
    assert bool((error <= limit).all()), (
        f"{int((~(error <= limit)).sum())} of {len(error)} rows off, "
        f"worst {float((error / limit).nan_to_num(float('inf')).max()):.3g} times the limit"
    )
