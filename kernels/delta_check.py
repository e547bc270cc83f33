"""Whether this machine's Triton compiles `delta_scan` rightly, asked once for each kind of head.

Triton before 3.7.1 has wrong code on Hopper for some products that delta rules are made of, without
a word: before the launches are first trusted with heads of a kind, they run two short documents,
whose results and gradients are compared with the plain-torch reference's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import delta_launch
from . import delta_rule_reference as reference

# Of queries: Triton compiles anew for multiples of 16, as numbers of heads and tokens mostly are.
GROUPS = 16
# Of the largest value: ten times what rounding to 16 bits does here, and far less than wrong code.
FAR = 0.05


def passes(q: Tensor, p: int, share: int) -> bool:
    """For queries like q [b, s, g, n], each shared by `share` heads of p; on CPUs, where launches
    are interpreted, True.
    """
    return not q.is_cuda or _asked(q.device, q.dtype, q.shape[-1], p, share)


@functools.cache
def _asked(device: torch.device, dtype: torch.dtype, n: int, p: int, share: int) -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        try:
            off = differences(device, dtype, n, p, share)
        except Exception as error:  # whatever compiling or launching raises
            _say(f"{type(error).__name__}: {error}")
            return False
    if not all(d <= FAR for d in off.values()):
        worst = max(off, key=lambda name: off[name])
        _say(f"{worst} differs from plain torch's by {off[worst]:.2g} of its largest value")
        return False
    return True


def differences(
    device: torch.device | str, dtype: torch.dtype, n: int, p: int, share: int
) -> dict[str, float]:
    """By how much of the largest value the launches' results differ from the reference's."""
    s, g = 2 * delta_launch.CHUNK + 16, torch.Generator().manual_seed(0)
    heads = GROUPS * share

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    q, k = (torch.nn.functional.normalize(draw(1, s, GROUPS, n), dim=-1).to(dtype) for _ in "qk")
    v, dy = (draw(1, s, heads, p).to(dtype) for _ in range(2))
    beta, decay = draw(1, s, heads).sigmoid(), -draw(1, s, heads).sigmoid()
    starts = torch.zeros(1, s, dtype=torch.bool, device=device)
    starts[:, s // 3] = True

    def run(wide: bool) -> list[Tensor]:
        given = [t.float() if wide else t for t in (q, k, v, beta, decay)]
        leaves = [t.detach().requires_grad_() for t in given]
        scan: Callable[..., Any] = reference.scan if wide else delta_launch.chunked
        y, last = scan(*leaves, starts, torch.zeros(1, heads, n, p, device=device))
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return [y.detach(), last.detach(), *grads]

    names = ("y", "last", "dq", "dk", "dv", "dbeta", "ddecay")
    pairs = zip(names, run(False), run(True), strict=True)
    return {name: float((a.float() - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def _say(what: str) -> None:
    warnings.warn(
        f"the delta rule's launches fail their check on this GPU ({what}): gated delta nets run in "
        "plain torch, many times slower; another release of Triton, or flash-linear-attention "
        "(pip install 'purelm[fla]'), may serve",
        stacklevel=2,
    )
