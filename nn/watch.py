"""Where a pass first makes what is not finite: checks for debugging, forward and backward.

Each waits for the device, so no pass has them unasked. A gradient is checked where it arrives, by
hooks, in the order in which backward makes them: the last layer's first.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree

from ..errors import TrainingError
from . import tree
from .attention import Heads, Visible
from .fast_layer import Layer
from .halves import whole
from .lora import LoRA
from .residuals import KEEP
from .spec import LayerSpec

# A layer's residuals in the order in which they are made.
_MADE = {
    "low_qkv": "what the adapters of its attention make narrow",
    "qkv": "q, k or v as projected",
    "out": "the attention's output",
    "low_o": "what the adapter of o makes narrow",
    "attn_branch": "what its mixer makes",
    "mid": "the hidden states between its mixer and its MLP",
    "low_gate_up": "what the adapters of gate and up make narrow",
    "gate_up": "gate or up as projected",
    "low_down": "what the adapter of down makes narrow",
    "experts": "the experts' sum",
    "shared": "what the shared MLP makes",
    "mlp_branch": "what its MLP makes",
}


def checked(x: torch.Tensor, what: str) -> torch.Tensor:
    """x itself; its gradient is checked when it comes.

    Raises TrainingError where a value is not finite, now or in backward.
    """
    if _bad(x):
        raise TrainingError(f"{what} has {_count(x)}")
    return _gradient_checked(what, x)


def of_trained(leaves: tree.Tree, prefix: str) -> tree.Tree:
    """The tree, of whose trained tensors the gradients are checked as they come."""

    def with_path(path: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            parts: dict[str, Any] = {
                k: _gradient_checked(f"{path}.{k}", t) for k, t in _parts(leaf).items()
            }
            return replace(leaf, **parts)
        return tree.map_tensors(partial(_gradient_checked, path), leaf)

    return tree.map_with_path(with_path, leaves, prefix)


def check_weights(params: tree.Tree, adapters: tree.Tree) -> None:
    """Raise TrainingError for the first tensor, or quantized weight, that is not finite: what is
    made of it may be (some fused attention leaves NaN out).
    """
    for path, leaf in [*tree.items(params), *tree.items(adapters)]:
        for name, part in _parts(leaf).items() if isinstance(leaf, LoRA) else [("", leaf)]:
            if _bad(part):
                raise TrainingError(f"{path}.{name}".rstrip(".") + f" has {_count(part)}")


def check_layer(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: Any,
    seen: Visible,
    starts: torch.Tensor | None,
    heads: Heads | None,
    *,
    index: int,
    spec: LayerSpec,
    seed: int | None,
) -> None:
    """Run a layer of finite x once more, keeping all; TrainingError names what is not finite first.

    What a layer makes is looked at, not only what comes of it, for the same reason.
    """
    if whole(spec, p, adapters, seen, seed):
        return
    p, adapters = (tree.map_tensors(lambda t: t.detach(), one) for one in (p, adapters))
    layer = Layer(index, spec, seen, KEEP, None, seed)
    with torch.no_grad():
        _, made = layer.bound(x.dtype, p, adapters, table, starts, heads).forward(x.detach())
    for residual, words in _MADE.items():
        value = made.get(residual)
        # Of attention the output alone: its log-sum-exp may be infinite where nothing is seen.
        value = getattr(value, "out", value)
        if _bad(value):
            raise TrainingError(f"layers.{index}: {words} has {_count(value)}")


def _parts(leaf: LoRA) -> dict[str, torch.Tensor]:
    parts = {"a": leaf.a, "b": leaf.b, "magnitude": leaf.magnitude}
    return {name: part for name, part in parts.items() if part is not None}


def _gradient_checked(name: str, t: torch.Tensor) -> torch.Tensor:
    if not t.requires_grad:
        return t

    def check(gradient: torch.Tensor) -> None:
        if _bad(gradient):
            raise TrainingError(f"the gradient of {name} has {_count(gradient)}")

    # A view's hook goes with the graph of this pass; one on a parameter would stay.
    view = t.view_as(t)
    view.register_hook(check)  # type: ignore[no-untyped-call]
    return view


def _floats(leaves: Any) -> Sequence[torch.Tensor]:
    tensors = (t for t in _pytree.tree_leaves(leaves) if isinstance(t, torch.Tensor))
    # fp8 has none of these functions.
    return [t.detach() if t.itemsize > 1 else t.float() for t in tensors if t.is_floating_point()]


def _bad(leaves: Any) -> bool:
    return not all(bool(t.isfinite().all()) for t in _floats(leaves))


def _count(leaf: Any) -> str:
    """What is said of it, as things are checked in the order in which they are made."""
    nan, infinite, count = 0, 0, 0
    for t in _floats(leaf):
        nan, infinite = nan + int(t.isnan().sum()), infinite + int(t.isinf().sum())
        count += t.numel()
    return f"{nan} NaN and {infinite} infinite of {count} values, the first that are not finite"
