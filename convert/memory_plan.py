"""The memory plan of a model: what `use_gradient_checkpointing="auto"` does at a batch's shape."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..kernels.attention import backend_for
from ..nn import dense_weights, experts, tree
from ..nn.attention import needs_mask
from ..nn.layout import Layout
from ..nn.plan import plan
from ..nn.residuals import Policy, Residuals
from ..nn.spec import LayerSpec, MoESpec
from ..nn.step_shape import Shape
from ..quant.fp8_product import computes
from .free_memory import free_bytes

if TYPE_CHECKING:
    from .bridge import CausalLM

# Of the free memory: what fragments, and what libraries take for themselves.
_MARGIN = 0.08
# What libraries allocate for themselves through torch on a GPU: matrix products' workspace.
_WORKSPACE = 64 * 2**20
# Rows of like length share a plan, made for the longest of them.
_STEP = 256


def is_masked(model: "CausalLM", layout: Layout) -> bool:
    """Whether some layer's attention over it needs a mask, with which it runs through autograd."""
    return any(needs_mask(layout, model.dtype, a.chunk) for a in model.spec.attentions())


def residuals_for(model: "CausalLM", batch: int, length: int, *, masked: bool = False) -> Residuals:
    """The policies for a batch [batch, length]; under "auto" planned when its shape is new.

    Raises ArgumentError where the budget is below the least possible.
    """
    if model.residuals != "auto":
        model.dense.keep(0)
        return _tiled(model.residuals, model.tile)
    if length > _STEP:
        length = -(-length // _STEP) * _STEP
    found = model.plans.get((batch, length, masked))
    if found is None:
        device = model.device
        first = next(model.spec.attentions(), None)
        adapters, layers = model.adapters, model.params["layers"]
        worn = [tree.get(adapters, "layers", i) for i in range(len(layers))]
        shape = Shape(
            batch,
            length,
            model.dtype.itemsize,
            offload=device.type == "cuda",
            scores=first is not None and _scores(model, first.head_dim),
            ranks=max(_ranks(*pair) for pair in zip(model.spec.layers, worn, strict=True)),
            tile=model.tile,
            masked=masked,
            dora=any(leaf.magnitude is not None for leaf in tree.leaves(adapters)),
            dropout=any(leaf.dropout for leaf in tree.leaves(adapters)),
            trained=_trains_layers(model),
            fp8=any(computes(leaf) for leaf in tree.leaves(layers)),
            one_by_one=any(experts_wait(model, seed=0)),
            rounded=model.qat_scheme is not None,
            gradients=_gradients(layers, worn),
        )
        allocated = _allocated(device) - model.dense.nbytes
        fixed = max(_lasting(model), allocated) + _casts(model)
        fixed += _WORKSPACE if device.type == "cuda" else 0
        budget = model.memory_budget
        if budget is None:  # what lasts and is not there yet is taken from what is free
            budget = max(_there(model), allocated) + _free(device) + model.dense.nbytes
        # DoRA reads its weights in fp32, which are not what 16 bits of them are.
        dense = () if shape.dora else dense_weights.bytes_of(model.params, model.dtype.itemsize)
        found = plan(model.spec, shape, budget=budget, fixed=fixed, dense=dense)
        known = {(p.policies, p.gains and p.room) for p in model.plans.values()}
        model.plans[batch, length, masked] = found
        # All shapes have the same, so as many as the one with least room has.
        plans = model.plans.values()
        model.dense.keep(min(p.room for p in plans) if any(p.gains for p in plans) else 0)
        if (found.policies, found.gains and found.room) not in known:
            print(f"purelm: {found}", file=sys.stderr)
    return found.policies


def _scores(model: "CausalLM", head_dim: int) -> bool:
    """Whether attention over heads of this width writes its scores out."""
    probe = torch.empty((1, 1, 1, head_dim), dtype=model.dtype, device=model.device)
    return backend_for(probe) == "reference"


@contextmanager
def told(model: "CausalLM", residuals: Residuals | None) -> Iterator[None]:
    """Inside, memory that runs out says what was planned and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        if residuals is not None:
            problem.add_note(advice(model))
        model.dense.give_up()
        raise


def advice(model: "CausalLM") -> str:
    """What to change where memory ran out: the policy that ran, the bytes planned for it."""
    if model.plans:
        last = list(model.plans.values())[-1]
        lower = int((last.budget if model.memory_budget is None else model.memory_budget) * 0.85)
        return (
            f"the memory plan was: {last}; give a lower memory_budget (such as {lower}), fewer "
            "rows or shorter ones, and see that no other process takes the device's memory"
        )
    return (
        f"the residuals' policy was {model.residuals}; use_gradient_checkpointing='unsloth' needs "
        "the least memory, 'auto' fills what there is; or take fewer rows or shorter ones"
    )


def _lasting(model: "CausalLM") -> int:
    """Bytes that last for the whole run: params, and a gradient and two moments of what is trained
    (in its dtype, as torch's AdamW has them).
    """
    return _params(model) + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _there(model: "CausalLM") -> int:
    """Bytes of these that are known to be there: not an optimizer's, which nobody here sees."""
    return _params(model) + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def _params(model: "CausalLM") -> int:
    return sum(tree.nbytes(t) for t in _held(model)) - tree.nbytes(model.host_tables)


def _casts(model: "CausalLM") -> int:
    """Bytes of what is trained as a step computes with it, from its forward to its backward."""
    adapters, copies = tree.leaves(model.adapters), tree.tensors(model.trained)
    scaled = [
        t for one in adapters if one.scale != 1.0 or one.magnitude is not None for t in [one.b]
    ]
    others = [t for one in adapters for t in (one.a, one.b)] + copies
    cast = {id(t): t for t in [*scaled, *(t for t in others if t.dtype != model.dtype)]}
    count: int = sum(t.numel() for t in cast.values())
    if model.mixed:
        count += sum(leaf.numel() for leaf in tree.leaves(model.base_params))
    return count * model.dtype.itemsize


def _held(model: "CausalLM") -> list[tree.Tree]:
    """Everything that lies in memory: adapters that do not act now, too."""
    others = [part for w in model.worn.values() for part in (w.adapters, w.start, w.trained)]
    return [model.base_params, *others]


def _tiled(residuals: Residuals, tile: int | None) -> Residuals:
    if tile is None:
        return residuals
    if isinstance(residuals, Policy):
        return replace(residuals, gate_up="recompute", tile=tile)
    return tuple(replace(one, gate_up="recompute", tile=tile) for one in residuals)


def _trains_layers(model: "CausalLM") -> bool:
    """Whether weights of the layers are trained themselves: all of them, or copies of some."""
    return model.train_all or bool(tree.tensors((model.trained or {}).get("layers", {})))


def experts_wait(model: "CausalLM", seed: int | None = None) -> list[str | None]:
    """Of each layer, why its experts run one after the other, if it has any and they do."""
    found: list[str | None] = []
    for i, layer in enumerate(model.spec.layers):
        own = tree.get(model.adapters, "layers", i, "mlp", "experts")
        p = tree.get(model.params, "layers", i, "mlp", "experts")
        mlp = layer.mlp
        found.append(experts.waits_for(p, own, mlp, seed) if isinstance(mlp, MoESpec) else None)
    return found


def _ranks(layer: LayerSpec, worn: tree.Tree) -> int:
    """The ranks of a layer's adapters, of experts' those that a token passes."""
    of_experts = tree.leaves(tree.get(worn, "mlp", "experts"))
    active = layer.mlp.active if isinstance(layer.mlp, MoESpec) else 1
    ranks: list[int] = [leaf.rank for leaf in tree.leaves(worn)]
    return sum(ranks) + (active - 1) * sum(int(leaf.rank) for leaf in of_experts)


def _gradients(params: Sequence[tree.Tree], worn: Sequence[tree.Tree]) -> int:
    """Bytes of the gradients of the layer that has most trained."""
    most = 0
    for both in zip(params, worn, strict=True):
        count: int = sum(t.nbytes for t in tree.tensors(list(both)) if t.requires_grad)
        most = max(most, count)
    return most


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free(device: torch.device) -> int:
    """Bytes that can still be taken, less the margin."""
    return int(free_bytes(device) * (1 - _MARGIN))
