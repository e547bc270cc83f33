"""One stored weight and its adapter: the sum, and the check that a sum is right."""

import hashlib
from dataclasses import dataclass

import torch

from ..errors import SaveError
from ..nn import lora
from ..nn.lora import LoRA
from .fused import Fused


@dataclass(frozen=True)
class Parts:
    """What each of a fused tensor's projections becomes; it is stored [in, out] where `turned`."""

    fused: Fused
    changes: tuple[torch.Tensor | LoRA | None, ...]
    turned: bool = False


# What replaces a stored tensor, or is added to it; None: it stays.
Change = torch.Tensor | LoRA | Parts | None

# Elements that are in fp32 (or float64, when checking) at a time.
_CHUNK = 1 << 23


def changed(base: torch.Tensor, change: Change, name: str) -> torch.Tensor:
    """`base` as stored, with its change, written into it where that can be.

    Of a fused tensor one part at a time is in memory beside it. Raises SaveError for values that
    its dtype cannot hold.
    """
    if change is None:
        return base
    if isinstance(change, LoRA):
        return merged(base, change, name)
    if isinstance(change, torch.Tensor):
        made = change.detach().to("cpu", base.dtype)
        if not bool(made.isfinite().all()):
            raise SaveError(f"{name} has values that are not finite in {made.dtype}")
        return made.view(base.shape)
    whole = base.mT if change.turned else base
    for i, one in enumerate(change.changes):
        if one is not None:
            path = f"{change.fused.paths[i]} in {name}"
            change.fused.put(whole, i, changed(change.fused.part(whole, i), one, path))
    return base


def is_whole(change: Change) -> bool:
    """Whether nothing is left of what it changes."""
    if isinstance(change, Parts):
        return all(isinstance(one, torch.Tensor) for one in change.changes)
    return isinstance(change, torch.Tensor)


def merged(base: torch.Tensor, adapter: LoRA, name: str) -> torch.Tensor:
    """base [out, in] with its adapter, summed in fp32 and rounded once; written into `base`.

    Raises SaveError for a result that its dtype cannot hold.
    """
    a, b = adapter.a.detach().float().cpu(), adapter.b.detach().float().cpu()
    for rows in _rows(base):
        m = None if adapter.magnitude is None else adapter.magnitude.detach().cpu()[rows]
        base[rows] = lora.merged(base[rows], LoRA(a, b[rows], adapter.scale, magnitude=m))
        if not bool(base[rows].isfinite().all()):
            raise SaveError(f"{name} merged has values that are not finite in {base.dtype}")
    return base


def check_changed(base: torch.Tensor, written: torch.Tensor, change: Change, name: str) -> None:
    """Raise SaveError unless `written` is `base`, both as stored, with the adapters in `change`."""
    if isinstance(change, LoRA):
        check(base, written, change, name)
    elif isinstance(change, Parts):
        wholes = [whole.mT if change.turned else whole for whole in (base, written)]
        for i, one in enumerate(change.changes):
            if not isinstance(one, torch.Tensor):
                path = f"{change.fused.paths[i]} in {name}"
                before, after = (change.fused.part(whole, i) for whole in wholes)
                if one is not None:
                    check(before, after, one, path)
                elif not torch.equal(before, after):
                    raise SaveError(f"{path} was to stay as it is, and is written otherwise")


def check(base: torch.Tensor, written: torch.Tensor, adapter: LoRA, name: str) -> None:
    """Raise SaveError unless every element of `written` is base + scale * b @ a in float64.

    Within the roundings that `merged` makes: half a step of the stored dtype, and those of an fp32
    sum of rank products. With DoRA the rows of that have their magnitudes as lengths.
    """
    a, b = adapter.a.detach().double().cpu(), adapter.b.detach().double().cpu()
    stored, single = torch.finfo(base.dtype), torch.finfo(torch.float32)
    # Each row of |b| times each column of |a| is at most the product of their lengths.
    a_size, b_size = a.norm(dim=0), abs(adapter.scale) * b.norm(dim=1)
    smallest = stored.smallest_normal * stored.eps
    for rows in _rows(base):
        want = base[rows].double().addmm_(b[rows], a, alpha=adapter.scale)
        off = want.abs().addr_(b_size[rows], a_size).mul_((adapter.rank + 3) * single.eps)
        if adapter.magnitude is not None:
            length = want.norm(dim=1, keepdim=True).clamp_(min=single.tiny)
            factor = adapter.magnitude.detach().double().cpu()[rows, None] / length
            # The length is off by no more than the row is; two products are rounded to fp32.
            off = factor.abs() * (off + want.abs() * (off.norm(dim=1, keepdim=True) / length))
            want.mul_(factor)
            off.add_(want.abs(), alpha=2 * single.eps)
        bound = want.abs().mul_(stored.eps / 2).add_(off).add_(smallest)
        # A NaN compares false and must not pass.
        if not bool((want.sub_(written[rows]).abs_() <= bound).all()):
            raise SaveError(f"{name} as written is not its base plus its adapter; nothing is saved")


def digest(tensor: torch.Tensor) -> bytes:
    """A fingerprint of the tensor's bytes, as they stand in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()


def _rows(base: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK // base.shape[1])
    return [slice(first, first + step) for first in range(0, base.shape[0], step)]
