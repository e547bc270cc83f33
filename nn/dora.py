"""DoRA (arXiv 2402.09353): an adapted weight's rows have trained lengths of their own.

The weight is magnitude * (w + delta) / |w + delta|, row by row. As in the paper's section 4.3, and
in peft, no gradient flows through the length |w + delta|.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..quant.linear import linear, weight_of

if TYPE_CHECKING:
    from .lora import LoRA


# Rows whose fp32 copies are made at a time.
CHUNK = 1 << 11
# What stands for a magnitude of 0 where its gradient comes of what its row made: too small to show
# in sums, and a power of two, so that dividing by it again rounds nothing (float16 has none so
# small: there the gradient is 0).
NOTHING = 2.0**-64


def lengths(weight: Any, adapter: "LoRA") -> torch.Tensor:
    """|w + scale * b @ a| of each row, [out] in fp32, without a gradient."""
    a, b = adapter.a.detach().float(), adapter.b.detach().float()
    whole = weight_of(weight, torch.float32).detach() + (b @ a) * adapter.scale
    made: torch.Tensor = torch.linalg.vector_norm(whole, dim=-1)
    return made


def factor(weight: Any, adapter: "LoRA") -> torch.Tensor:
    """What each row of w + delta is multiplied by, [out] in fp32; 0 for rows of zeros."""
    assert adapter.magnitude is not None
    length = lengths(weight, adapter)
    return torch.where(length > 0, adapter.magnitude.float() / length, 0.0)


def adapted(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    adapter: "LoRA",
    dropped: torch.Tensor,
    low: torch.Tensor,
) -> torch.Tensor:
    """x [..., in] through the adapted weight, [..., out] in plain differentiable operations.

    dropped: x after the adapter's dropout (x itself without); low: dropped @ a^T [..., r]. As in
    peft, a dropped feature is left out of the change that the factor makes, not of the base.
    """
    rows = factor(weight, adapter).to(x.dtype)
    change = low @ (adapter.b * adapter.scale).to(x.dtype).mT
    y = linear(x, weight)
    if dropped is x:
        y = (y + change) * rows
    else:
        y = y + (rows - 1) * linear(dropped, weight) + rows * change
    return y if bias is None else y + bias.to(y.dtype)


def folded(weight: Any, adapter: "LoRA", dtype: torch.dtype) -> "LoRA":
    """The adapter as `products.products` takes it: its magnitude what each row of the weight is
    multiplied by, in `dtype`, and b with its scale multiplied by that already.
    """
    rows = factor(weight, replace(adapter, magnitude=never_0(adapter))).to(dtype)
    b = adapter.b * adapter.scale * rows.to(adapter.b.dtype)[:, None]
    return replace(adapter, b=b, scale=1.0, magnitude=rows)


def never_0(adapter: "LoRA") -> torch.Tensor:
    """The magnitudes as `folded` takes them, by which the gradient of `pull_rows` is divided."""
    assert adapter.magnitude is not None
    return torch.where(adapter.magnitude == 0, NOTHING, adapter.magnitude)


def scaled_rows(weight: torch.Tensor, adapter: "LoRA | None") -> torch.Tensor:
    """A dense weight as an adapter of `folded` has it."""
    if adapter is None or adapter.magnitude is None:
        return weight
    return weight * adapter.magnitude.to(weight.dtype)[:, None]


def pull_rows(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: Any,
    adapter: "LoRA",
    db: torch.Tensor,
    made: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of the magnitudes times these, [out] in fp32 or wider: for each output the sum
    of dy [t, out] times what the adapted weight made of x [t, in].

    made: that, without a bias, in which little would be lost; where it is not there, the same comes
    of dy^T x and the weight, a product more. db: the gradient of the folded b.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    if made is None:
        dense = scaled_rows(weight_of(weight, dy.dtype), adapter)
        total = ((dy.mT @ x).to(wide) * dense).sum(-1)
        return total + (db.to(wide) * adapter.b).sum(-1)
    total = torch.zeros(dy.shape[1], dtype=wide, device=dy.device)
    for part, y in zip(torch.split(dy, CHUNK), torch.split(made, CHUNK), strict=True):
        total += (y.to(wide) * part).sum(0)
    return total
