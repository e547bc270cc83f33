"""Whether a kernel's result is right, before it is timed: the tolerance rule of the tests.

Over each row max|ours - exact| <= 2 max|eager - exact| + eps max|exact|, where eager is plain torch
in the same dtype and exact the same in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


class CheckFailed(Exception):
    """A kernel's result is not its reference's: it is not timed."""


def same(what: str, ours: Tensor, reference: Tensor) -> None:
    """Raises CheckFailed unless the two are equal bit for bit."""
    if not torch.equal(ours.to(reference.device), reference):
        wrong = int((ours.to(reference.device) != reference).sum())
        raise CheckFailed(f"{what}: {wrong} of {ours.numel()} values differ from the reference")


def close(what: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Raises CheckFailed where a row of `ours` [..., n] breaks the rule."""
    mine, plain, truth = (
        t.detach().double().reshape(-1, t.shape[-1]) for t in (ours, eager, exact)
    )
    error = (mine - truth).abs().amax(1)
    limit = 2 * (plain - truth).abs().amax(1)
    limit += torch.finfo(ours.dtype).eps * truth.abs().amax(1)
    # A NaN of ours compares false and must not pass.
    wrong = int((~(error <= limit)).sum())
    if wrong:
        worst = float((error / limit).nan_to_num(float("inf")).max())
        raise CheckFailed(f"{what}: {wrong} of {len(error)} rows off, {worst:.3g} times the limit")


def near(what: str, ours: Tensor, exact: Tensor, share: float = 0.02) -> None:
    """Raises CheckFailed where `ours` is off by more than a share of the largest value: for what
    rounds on its way as no plain torch does, a scan's parts.
    """
    off = (ours.detach().double() - exact).abs().max() / exact.abs().max()
    if not bool(off <= share):
        raise CheckFailed(f"{what}: off by {float(off):.2g} of the largest value, over {share}")


def outputs(
    f: Function, args: Sequence[Tensor], ups: Sequence[Tensor], wanted: Sequence[int]
) -> Any:
    """[outputs of f(*args), then its gradients in the arguments `wanted`, given those of the
    outputs]."""
    args = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(args)]
    found = f(*args)
    outs = [found] if isinstance(found, Tensor) else list(found)
    grads = torch.autograd.grad(outs, [args[i] for i in wanted], ups) if wanted else ()
    return [t.detach() for t in (*outs, *grads)]


def against(
    ours: Function, reference: Function, wanted: Sequence[int] = (), *, flat: bool = False
) -> Function:
    """A check of `ours`, and of its gradients in the arguments `wanted`, against `reference`.

    `flat` takes each tensor for one row.
    """

    def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.double() if t.is_floating_point() else t for t in tensors]

    def check(args: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
        mine = outputs(ours, args, ups, wanted)
        eager = outputs(reference, args, ups, wanted)
        exact = outputs(reference, wide(args), wide(ups), wanted)
        names = ["output"] * (len(mine) - len(wanted)) + [f"gradient {i}" for i in wanted]
        for name, *three in zip(names, mine, eager, exact, strict=True):
            close(name, *(t.reshape(1, -1) if flat or not t.dim() else t for t in three))

    return check
