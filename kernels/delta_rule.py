"""The gated delta rule over the fastest backend that serves, its math as in `delta_rule_reference`.

flash-linear-attention's Triton kernels where that is installed (the extra `fla`) and has what is
asked for; else our own (`delta_launch`), or the plain-torch reference, which also serves fp32.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import delta_check, delta_launch
from . import delta_rule_reference as reference
from .launch import on_gpu
from .rms_norm import rms_norm

Backend = Literal["fla", "triton", "reference"]
# Beside the squares of a query's or a key's features, as in flash-linear-attention.
EPS = 1e-6
# The oldest release whose kernels have groups of values that share a key.
OLDEST = (0, 6)
# From this Triton on, and before that, its gradients are wrong on Hopper (its issue 640).
WRONG = ((3, 4, 0), (3, 7, 1))
# The most features of a key in its kernels.
WIDEST = 256
# The logarithm of what is left of a state at a start. Those kernels subtract sums of decays in a
# chunk, which minus infinity would make nan and a larger number inexact: 1e-22 is nothing.
FORGOTTEN = -50.0


def backend_for(q: Tensor, v: Tensor, trains: bool = False) -> Backend:
    """Which backend runs queries q [b, s, g, n] and values v [b, s, h, p], and their gradients if
    it `trains`: of device, dtype and shape, and of what is installed.
    """
    if q.dtype not in (torch.bfloat16, torch.float16) or not on_gpu(q, v):
        return "reference"
    if torch._C._are_functorch_transforms_active():
        return "reference"
    if q.is_cuda and q.shape[-1] <= WIDEST and _chunked() is not None:
        if not trains or _differentiates(q.device):
            return "fla"
    if max(q.shape[-1], v.shape[-1]) > delta_launch.WIDEST:
        return "reference"
    share = v.shape[2] // q.shape[2]
    return "triton" if delta_check.passes(q, v.shape[-1], share) else "reference"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """q and k [b, s, g, n], v [b, s, h, p], beta and decay fp32 [b, s, h] -> y [b, s, h, p] and,
    with `before`, the last state fp32 [b, h, n, p].

    Queries and keys are made as long as 1 here, and queries scaled by n**-0.5. starts bool [b, s]
    and before [b, h, n, p] as in `delta_rule_reference.scan`. y is fp32 from the reference, which
    computes in it (fp64 of wider inputs), and of v's dtype from other backends. Differentiable in
    all but `starts`.
    """
    tensors = (q, k, v, beta, decay, before)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    plain = q.shape[1] == 1 or not on_gpu(*tensors, starts)
    backend = "reference" if plain else backend_for(q, v, trains)
    if backend == "fla":
        chunked = _chunked()
        assert chunked is not None
        if starts is not None:
            decay = decay.masked_fill(starts[..., None], FORGOTTEN)
        y, last = chunked(
            q, k, v, decay, beta, initial_state=before, output_final_state=before is not None,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return y, last
    # Our launches have no gradient of the state before.
    if backend == "triton" and not (trains and before is not None and before.requires_grad):
        n = q.shape[-1]
        q, k = (_unit_launched(t, scale) for t, scale in ((q, n**-0.5), (k, 1.0)))
        y, last = delta_launch.chunked(q, k, v, beta, decay, starts, before)
        return y, None if before is None else last
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = (_unit(t.to(wide)) for t in (q, k))
    taken = q * q.shape[-1] ** -0.5, k, v.to(wide), beta, decay, starts
    if before is None:
        return reference.scan(*taken, None)[0], None
    return (reference.step if v.shape[1] == 1 else reference.scan)(*taken, before)


def rates(beta: Tensor, decay: Tensor, dt_bias: Tensor, a_log: Tensor) -> tuple[Tensor, Tensor]:
    """Raw rates and decays [b, s, h] -> those of the rule, in fp32 or wider; dt_bias and a_log [h].

    sigmoid(beta) and -exp(a_log) softplus(decay + dt_bias).
    """
    wide = torch.promote_types(decay.dtype, torch.float32)
    decay = F.softplus(decay.to(wide) + dt_bias.to(wide)) * -a_log.to(wide).exp()
    return beta.to(wide).sigmoid(), decay


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _unit_launched(x: Tensor, scale: float) -> Tensor:
    """`scale` times x [b, s, g, n] made as long as 1, rounded once."""
    n = x.shape[-1]
    weight = torch.full((n,), scale * n**-0.5, dtype=torch.float32, device=x.device)
    return rms_norm(x, weight, EPS / n, cast_first=False)


@functools.cache
def _chunked() -> Callable[..., Any] | None:
    """flash-linear-attention's chunked rule, looked for once; None where it is not installed, or
    cannot be used, which a warning says.
    """
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        import fla
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception as error:  # whatever a broken install raises
        _say(f"cannot be imported ({type(error).__name__}: {error})")
        return None
    found = str(getattr(fla, "__version__", "unknown"))
    if not _new_enough(found):
        _say(f"is version {found}, expected {'.'.join(map(str, OLDEST))} or newer")
        return None
    rule: Callable[..., Any] = chunk_gated_delta_rule
    return rule


@functools.cache
def _differentiates(device: torch.device) -> bool:
    """Whether flash-linear-attention has gradients on a GPU: it refuses them on Hopper with a
    Triton from 3.4 to 3.7.0, whose code for them is wrong, unless TileLang is there to take over.
    """
    if torch.cuda.get_device_capability(device)[0] != 9 or importlib.util.find_spec("tilelang"):
        return True
    triton = importlib.metadata.version("triton")
    return not WRONG[0] <= tuple(int(n) for n in re.findall(r"\d+", triton)[:3]) < WRONG[1]


def _new_enough(version: str) -> bool:
    parts = version.split(".")[:2]
    return all(part.isdigit() for part in parts) and tuple(map(int, parts)) >= OLDEST


def _say(what: str) -> None:
    warnings.warn(
        f"the installed flash-linear-attention {what}: gated delta nets run in plain torch, "
        "slower; repair it (pip install 'purelm[fla]') or uninstall it",
        stacklevel=2,
    )
