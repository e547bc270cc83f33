"""Low-rank adapters (arXiv 2106.09685): a tree of `LoRA` leaves beside the frozen params."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils import _pytree

from ..quant.linear import weight_of
from . import tree
from .params import ParamSpec, param_specs
from .spec import ModelSpec

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
Start = Literal["kaiming", "gaussian", "orthogonal", "random"]


@dataclass(frozen=True, slots=True)
class LoRA:
    """The change scale * b @ a to a weight [out, in]: a [r, in], b [out, r].

    `dropout` is the probability with which an input feature is dropped in training.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


def _flatten(x: LoRA) -> tuple[list[Any], tuple[float, float]]:
    return [x.a, x.b], (x.scale, x.dropout)


def _unflatten(children: Any, static: tuple[float, float]) -> LoRA:
    a, b = children
    return LoRA(a, b, *static)


_pytree.register_pytree_node(LoRA, _flatten, _unflatten, serialized_type_name="purelm.nn.lora.LoRA")


def init(
    spec: ModelSpec,
    *,
    generator: torch.Generator,
    rank: int = 16,
    alpha: float | None = None,
    targets: tuple[str, ...] = TARGETS,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tree.Tree:
    """Adapters for every projection of every layer whose name is in `targets`.

    b is zero, so the adapted model starts equal to the base. scale = alpha / rank (alpha defaults
    to rank). Drawn on the generator's device: a CPU generator gives the same values everywhere.
    """
    scale = (rank if alpha is None else alpha) / rank
    leaves = {
        path.removesuffix(".weight"): one(
            p.shape, rank, scale, generator=generator, dropout=dropout, dtype=dtype, device=device
        )
        for path, p in tree.items(param_specs(spec))
        if _is_target(path, p, targets)
    }
    return tree.from_items(leaves)


def _is_target(path: str, p: ParamSpec, targets: tuple[str, ...]) -> bool:
    return p.quantize and path.split(".")[-2] in targets


def one(
    shape: tuple[int, ...],
    rank: int,
    scale: float,
    *,
    generator: torch.Generator,
    start: Start = "kaiming",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoRA:
    """One adapter for a weight of `shape` [out, in].

    kaiming: a uniform in +-1/sqrt(in), b zero (peft's default). gaussian: a normal with standard
    deviation 1/rank, b zero. orthogonal: a and b span orthogonal directions, so b @ a = 0 with
    neither zero (rank even). random: both kaiming (peft's `init_lora_weights=False`).
    """
    out, inp = shape
    on = generator.device
    a = torch.empty(rank, inp, device=on)
    b = torch.zeros(out, rank, device=on)
    if start == "gaussian":
        a.normal_(0.0, 1.0 / rank, generator=generator)
    elif start == "orthogonal":
        a, b = _orthogonal(out, inp, rank, generator)
    else:
        # kaiming_uniform with a = sqrt(5), which is what torch.nn.Linear and peft start from.
        a.uniform_(-1 / math.sqrt(inp), 1 / math.sqrt(inp), generator=generator)
        if start == "random":
            b.uniform_(-1 / math.sqrt(rank), 1 / math.sqrt(rank), generator=generator)
    return LoRA(a.to(device, dtype), b.to(device, dtype), scale, dropout)


def _orthogonal(
    out: int, inp: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """peft's "orthogonal": rows of one orthogonal matrix, odd ones for a, even ones for b."""
    drawn = torch.randn(rank, rank, generator=generator, device=generator.device)
    q, _ = torch.linalg.qr(drawn)
    odd, even = q[0::2], q[1::2]
    a = torch.randn(inp, rank // 2, generator=generator, device=generator.device) @ odd / 10.0
    b = torch.randn(rank // 2, out, generator=generator, device=generator.device).T @ even / 10.0
    return a.T.contiguous(), b.contiguous()


def delta(adapter: LoRA) -> torch.Tensor:
    """scale * b @ a [out, in] in fp32."""
    return (adapter.b.float() @ adapter.a.float()) * adapter.scale


def merge(params: tree.Tree, adapters: tree.Tree) -> tree.Tree:
    """New dense params with every adapter added to its weight (4-bit weights are dequantized)."""
    found = {f"{path}.weight": leaf for path, leaf in tree.items(adapters)}

    def add(path: str, leaf: Any) -> Any:
        if path not in found:
            return leaf
        dense = weight_of(leaf, leaf.dtype)
        return (dense.float() + delta(found[path]).to(dense.device)).to(dense.dtype)

    return tree.map_with_path(add, params)


def rescale(adapters: tree.Tree, factor: float) -> tree.Tree:
    """The adapters with `factor` times their strength."""
    return tree.map(lambda leaf: replace(leaf, scale=leaf.scale * factor), adapters)
