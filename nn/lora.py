"""Low-rank adapters (arXiv 2106.09685): a tree of `LoRA` leaves beside the frozen params."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree

from ..quant.linear import weight_of
from . import lora_init, tree
from .lora_init import Start
from .params import param_specs
from .spec import ModelSpec

TARGETS = (
    *("q", "k", "v", "q_a", "q_b", "kv_a", "kv_b", "o"),
    *("in", "out"),
    *("gate", "up", "down"),
)


@dataclass(frozen=True, slots=True)
class LoRA:
    """The change scale * b @ a to a weight [out, in]: a [r, in], b [out, r].

    `dropout` is the probability with which an input feature is dropped in training. magnitude
    [out]: the lengths of the adapted weight's rows, which makes it DoRA (nn/dora.py); None: LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


def _flatten(x: LoRA) -> tuple[list[Any], tuple[float, float]]:
    rows = [] if x.magnitude is None else [x.magnitude]
    return [x.a, x.b, *rows], (x.scale, x.dropout)


def _unflatten(children: Any, static: tuple[float, float]) -> LoRA:
    a, b, *rows = children
    return LoRA(a, b, *static, *rows)


_pytree.register_pytree_node(LoRA, _flatten, _unflatten, serialized_type_name="purelm.nn.lora.LoRA")


def init(
    spec: ModelSpec,
    *,
    generator: torch.Generator,
    rank: int = 16,
    alpha: float | None = None,
    targets: tuple[str, ...] = TARGETS,
    dropout: float = 0.0,
    start: Start = "kaiming",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tree.Tree:
    """Adapters for every projection of every layer whose name is in `targets`, and for the head,
    its own matrix or the embedding's, where "head" is.

    b is zero unless `start` says otherwise, so the adapted model starts equal to the base.
    scale = alpha / rank (alpha defaults to rank). Drawn on the generator's device: a CPU generator
    gives the same values everywhere.
    """
    scale = (rank if alpha is None else alpha) / rank
    shapes = {
        path.removesuffix(".weight"): p.shape
        for path, p in tree.items(param_specs(spec))
        if p.quantize and path.split(".")[-2] in targets
    }
    if "head" in targets:
        shapes["head"] = (spec.vocab, spec.dim)
    leaves = {
        module: one(
            shape,
            rank,
            scale,
            generator=generator,
            start=start,
            dropout=dropout,
            dtype=dtype,
            device=device,
        )
        for module, shape in shapes.items()
    }
    return tree.from_items(leaves)


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
    """One adapter for a weight of `shape` [out, in]; `start` as in `lora_init.draw`.

    For a stack [x, out, in] one of each, drawn one after the other: a [x, r, in], b [x, out, r].
    """
    if len(shape) == 3:
        pairs = [
            lora_init.draw(shape[1:], rank, start=start, generator=generator)
            for _ in range(shape[0])
        ]
        a, b = (torch.stack(column) for column in zip(*pairs, strict=True))
    else:
        a, b = lora_init.draw(shape, rank, start=start, generator=generator)
    return LoRA(a.to(device, dtype), b.to(device, dtype), scale, dropout)


def delta(adapter: LoRA) -> torch.Tensor:
    """scale * b @ a [out, in] (of a stack [x, out, in]) in fp32."""
    return (adapter.b.float() @ adapter.a.float()) * adapter.scale


def merged(weight: torch.Tensor, adapter: LoRA) -> torch.Tensor:
    """The fp32 weight [out, in] that `weight` with its adapter is."""
    whole = weight.float() + delta(adapter).to(weight.device)
    if adapter.magnitude is None:
        return whole
    # Lengths in float64, so that what is written is as near to the exact one as plain LoRA's is.
    lengths = torch.linalg.vector_norm(whole, dim=-1, dtype=torch.float64)
    tiny = torch.finfo(torch.float32).tiny
    rows = adapter.magnitude.to(weight.device).double() / lengths.clamp(min=tiny)
    return whole.mul_(rows.float()[..., None])


def merge(params: tree.Tree, adapters: tree.Tree) -> tree.Tree:
    """New dense params with every adapter put into its weight (quantized ones are dequantized). A
    head that is the embedding becomes a matrix of its own.
    """
    found = {f"{path}.weight": leaf for path, leaf in tree.items(adapters)}
    if "head.weight" in found and "weight" not in params.get("head", {}):
        head = {"weight": params["embed"]["weight"], **params.get("head", {})}
        params = {**params, "head": head}

    def add(path: str, leaf: Any) -> Any:
        if path not in found:
            return leaf
        dense = weight_of(leaf, leaf.dtype)
        return merged(dense, found[path]).to(dense.dtype)

    return tree.map_with_path(add, params)


def relative(adapters: tree.Tree, start: tree.Tree) -> tree.Tree:
    """Adapters of the changes since `start`: scale * (b @ a - b0 @ a0), as plain ones of rank 2r.

    For adapters that begin inside the weight (PiSSA, OLoRA), where those methods take the start
    out of the base weight; here the base stays as it is. Differentiable in `adapters`. Where
    `start` has no leaf, an adapter is returned as it is.
    """

    begun = dict(tree.items(start))

    def since(path: str, leaf: LoRA) -> LoRA:
        if path not in begun:
            return leaf
        a0, b0 = begun[path].a.to(leaf.a), begun[path].b.to(leaf.b)
        return replace(leaf, a=torch.cat([leaf.a, a0], dim=-2), b=torch.cat([leaf.b, -b0], dim=-1))

    return tree.map_with_path(since, adapters)


def rescale(adapters: tree.Tree, factor: float) -> tree.Tree:
    """The adapters with `factor` times their strength."""
    return tree.map(lambda leaf: replace(leaf, scale=leaf.scale * factor), adapters)
