"""One stored weight and its adapter: the sum, and the check that a sum is right."""

import hashlib

import torch

from ..errors import SaveError
from ..nn.lora import LoRA, delta

# What replaces a stored tensor, or is added to it; None: it stays.
Change = torch.Tensor | LoRA | None

# Elements that are in fp32 (or float64, when checking) at a time.
_CHUNK = 1 << 23


def merged(base: torch.Tensor, adapter: LoRA, name: str) -> torch.Tensor:
    """base [out, in] + scale * b @ a, added in fp32 and rounded once; written into `base`.

    Raises SaveError for a result that its dtype cannot hold.
    """
    a, b = adapter.a.detach().float().cpu(), adapter.b.detach().float().cpu()
    for rows in _rows(base):
        part = base[rows].float() + delta(LoRA(a, b[rows], adapter.scale))
        base[rows] = part
        if not bool(base[rows].isfinite().all()):
            raise SaveError(f"{name} merged has values that are not finite in {base.dtype}")
    return base


def probe(base: torch.Tensor, written: torch.Tensor, adapter: LoRA, name: str) -> None:
    """Raise SaveError unless `written` acts on a vector as base and adapter do (Freivalds' check).

    In float64, without forming b @ a. The bound is that of the roundings `merged` makes: one to the
    stored dtype, and those of an fp32 sum of rank products.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (base.shape[1],), generator=generator).double() * 2 - 1
    a, b = adapter.a.detach().double().cpu(), adapter.b.detach().double().cpu()
    low, low_size = a @ x, a.abs().sum(1)
    stored, single = torch.finfo(base.dtype), torch.finfo(torch.float32)
    for rows in _rows(base):
        got = written[rows].double()
        want = base[rows].double() @ x + adapter.scale * (b[rows] @ low)
        size = got.abs().sum(1)
        terms = abs(adapter.scale) * (b[rows].abs() @ low_size)
        bound = stored.eps * size + (adapter.rank + 3) * single.eps * (size + terms)
        bound += stored.smallest_normal * stored.eps * base.shape[1]
        # A NaN compares false and must not pass.
        if not bool(((got @ x - want).abs() <= bound).all()):
            raise SaveError(
                f"{name} as written does not act as its base and adapter do: the merge went wrong"
            )


def digest(tensor: torch.Tensor) -> bytes:
    """A fingerprint of the tensor's bytes, as they stand in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()


def _rows(base: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK // base.shape[1])
    return [slice(first, first + step) for first in range(0, base.shape[0], step)]
