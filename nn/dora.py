"""DoRA (arXiv 2402.09353): an adapted weight's rows have trained lengths of their own.

The weight is magnitude * (w + delta) / |w + delta|, row by row. As in the paper's section 4.3, and
in peft, no gradient flows through the length |w + delta|.
"""

from typing import TYPE_CHECKING, Any

import torch

from ..quant.linear import linear, weight_of

if TYPE_CHECKING:
    from .lora import LoRA


def lengths(weight: Any, adapter: "LoRA") -> torch.Tensor:
    """|w + scale * b @ a| of each row, [out] in fp32, without a gradient."""
    a, b = adapter.a.detach().float(), adapter.b.detach().float()
    whole = weight_of(weight, torch.float32).detach() + (b @ a) * adapter.scale
    made: torch.Tensor = torch.linalg.vector_norm(whole, dim=-1)
    return made


def factor(weight: Any, adapter: "LoRA") -> torch.Tensor:
    """What each row of w + delta is multiplied by, [out] in fp32; 0 for rows of zeros."""
    assert adapter.magnitude is not None
    tiny = torch.finfo(torch.float32).tiny
    return adapter.magnitude.float() / lengths(weight, adapter).clamp(min=tiny)


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
