"""The Int8 leaf: a frozen weight in 8 bits a row, multiplied with activations in 8 bits a token.

LLM.int8 (Dettmers et al., arXiv 2208.07339), with bitsandbytes' bytes: a row's scale is its largest
magnitude, its codes are the values times 127 / scale, rounded to even. An input column in which
some value reaches the threshold is multiplied apart, in fp32 with the dequantized weight, and takes
no part in the tokens' scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError
from ..kernels.launch import apply
from ..kernels.nf4 import FLOATS


@dataclass(frozen=True, eq=False)
class Int8:
    """A weight [out, in]: codes int8 [out, in] and scale fp32 [out], the largest magnitude of each
    row; a value is code * scale / 127. `dtype` is what it dequantizes to by default; inputs from
    `threshold` on (0: none) are kept out of the 8-bit product. A torch pytree node.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    threshold: float = 6.0

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return self.codes.dim()

    def numel(self) -> int:
        """The number of weights it stands for."""
        return self.codes.numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        return self.codes, self.scale

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Int8:
        """The same weight on another device; no dtype of its parts ever changes."""
        codes, scale = (part.to(device, non_blocking=non_blocking) for part in self.tensors)
        return Int8(codes, scale, self.dtype, self.threshold)


pytree.register_pytree_node(
    Int8,
    lambda leaf: (list(leaf.tensors), (leaf.dtype, leaf.threshold)),
    lambda parts, static: Int8(*parts, *static),
    serialized_type_name="purelm.Int8",
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [rows, n], scale fp32 [rows]) of x [rows, n]; a row of zeros has zero codes."""
    scale = x.abs().amax(1).float()
    step = torch.where(scale > 0, 127.0 / scale, 0.0)
    # In fp32 the reciprocal of a denormal overflows.
    step = step.clamp(max=torch.finfo(torch.float32).max)
    return torch.round(x.float() * step[:, None]).clamp(-127, 127).to(torch.int8), scale


def quantize(w: Tensor, *, threshold: float = 6.0, name: str | None = None) -> Int8:
    """`w` [out, in] (bf16, fp16 or fp32) in 8 bits a row.

    Raises KernelError for another dtype or shape, a negative threshold, and for NaN or infinite
    weights, naming `name` and their count.
    """
    if w.dim() != 2 or w.numel() == 0 or w.dtype not in FLOATS:
        raise KernelError(
            f"tensor {name!r} is {w.dtype} {list(w.shape)}: int8 takes bfloat16, float16 or "
            "float32 [out, in]"
        )
    if not threshold >= 0.0:
        raise KernelError(f"threshold {threshold}: expected 0 (no outliers) or more")
    codes, scale = quantize_rows(w.detach())
    if not bool(torch.isfinite(scale).all()):
        count = int((~torch.isfinite(w)).sum())
        raise KernelError(
            f"tensor {name!r} {list(w.shape)}: {count} of {w.numel()} values are NaN or infinite; "
            "int8 needs finite weights, so load it without quantization or repair the checkpoint"
        )
    return Int8(codes, scale, w.dtype, threshold)


def dequantize(leaf: Int8, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as a dense tensor [out, in] in `dtype` (default the leaf's own)."""
    return _dense(leaf.codes, leaf.scale, dtype or leaf.dtype)


def _dense(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * (scale.to(wide) / 127.0)[:, None]).to(dtype)


def linear(x: Tensor, leaf: Int8) -> Tensor:
    """x [..., in] times the transpose of the weight, [..., out] in the dtype of x.

    The weight is frozen; the gradient of x is that of the dequantized weight, as if the inputs had
    not been rounded. Raises KernelError for shapes that do not fit.
    """
    if x.shape[-1:] != leaf.shape[1:]:
        raise KernelError(
            f"input {list(x.shape)} and an int8 weight {list(leaf.shape)}: "
            "expected [..., in] and [out, in]"
        )
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = apply(_Int8Linear, flat, leaf.codes, leaf.scale, leaf.threshold)
    return y.view(*x.shape[:-1], leaf.shape[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times the transpose of b [n, k], int8 to int32, exact."""
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    if a.is_cuda:
        # cuBLAS wants more than 16 rows and widths that are multiples of 8: zeros fill up.
        a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(0, 24 - m)))
        if k % 8 or n % 8:
            b = torch.nn.functional.pad(b, (0, -k % 8, 0, -n % 8))
        return torch._int_mm(a, b.mT)[:m, :n]
    # torch's own int8 product is wrong for k = 1 on the CPU. fp32 holds sums of 1024 products.
    total = torch.zeros(m, n, dtype=torch.int32, device=a.device)
    for i in range(0, k, 1024):
        total += (a[:, i : i + 1024].float() @ b[:, i : i + 1024].float().mT).int()
    return total


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor:
        apart = None
        inner = x
        if threshold > 0.0:
            outliers = x.abs() >= threshold
            apart = outliers.any(0).nonzero().view(-1)
            # Small values of an outlier column still count for their token's scale, as in
            # bitsandbytes.
            inner = x.masked_fill(outliers, 0.0)
        if x.shape[0] == 0:
            return x.new_empty(0, codes.shape[0])
        x_codes, x_scale = quantize_rows(inner)
        if apart is not None:
            x_codes[:, apart] = 0
        y = _product(x_codes, codes).float() * (x_scale[:, None] * scale * (1.0 / 127.0**2))
        if apart is not None and apart.numel():
            y.addmm_(x[:, apart].float(), _dense(codes[:, apart], scale, torch.float32).mT)
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, codes, scale, _ = inputs
        ctx.save_for_backward(codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        codes, scale = ctx.saved_tensors
        return grad @ _dense(codes, scale, grad.dtype), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *frozen: Any) -> tuple[Tensor, int]:
        # One after the other: each member of the batch has outlier columns of its own.
        if any(dim is not None for dim in in_dims[1:]):
            raise KernelError("an int8 weight is frozen and cannot be batched by vmap")
        rows = [apply(_Int8Linear, one, *frozen) for one in x.unbind(in_dims[0])]
        return torch.stack(rows), 0
