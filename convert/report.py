"""What was loaded and which path each projection takes, in words."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.fp8 import MULTIPLE, takes
from ..nn import stacks, tree
from ..nn.halves import PARTS, runs_again
from ..nn.residuals import Policy
from ..quant.fp8 import Fp8
from ..quant.fp8_product import computes
from ..quant.int8 import Int8
from ..quant.nf4 import NF4
from ..quant.stack import Stack
from .memory_plan import experts_wait

if TYPE_CHECKING:
    from .bridge import CausalLM


def describe(model: "CausalLM") -> str:
    """The load report: what came from where, in which precision, with every deviation noted."""
    origin, spec = model.origin, model.spec
    leaves = tree.leaves(model.params)
    quantized = [_one(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    stored = ", ".join(sorted({_stored(leaf) for leaf in quantized})) or "quantized"
    revision = f" at {origin.revision}" if origin.revision else ""
    lines = [
        f"{origin.name}{revision}: {origin.family.model_type}, {len(spec.layers)} layers, "
        f"{sum(leaf.numel() for leaf in leaves) / 1e6:,.1f} M parameters on {model.device}",
        f"{len(quantized)} of {len(leaves)} weights {stored}, "
        f"{tree.nbytes(model.params) / 2**20:,.1f} MiB; computing in {model.dtype}",
    ]
    return "\n".join([*lines, _backward(model), *origin.notes])


def _one(leaf: Any) -> Any:
    """A weight of the stack that a leaf may be."""
    return leaf.inner if isinstance(leaf, Stack) else leaf


def _stored(leaf: NF4 | Int8 | Fp8) -> str:
    if isinstance(leaf, Fp8):
        return f"in fp8 (e4m3, a scale {'a block of 128 x 128' if leaf.blocks else 'a row'})"
    if isinstance(leaf, Int8):
        apart = f", inputs from {leaf.threshold:g} on apart" if leaf.threshold else ""
        return f"in int8 (a scale a row{apart})"
    scales = "plain" if leaf.absmax_scale is None else "double-quantized"
    return f"in {leaf.kind.upper()} (blocks of {leaf.block}, {scales})"


def explain(model: "CausalLM") -> str:
    """One line per projection: its format, its adapter, and how its product is computed."""
    kernel = "Triton" if model.device.type == "cuda" else "torch"
    lines = []
    params, adapters = model.params, stacks.separated(model.adapters)
    eight = any(computes(_one(leaf)) for leaf in tree.leaves(params))
    for path, stored in tree.items(params):
        module, _, name = path.rpartition(".")
        axes = 3 if ".experts." in path else 2
        if name != "weight" or getattr(stored, "ndim", 0) != axes or module.endswith("_norm"):
            continue
        leaf = _one(stored)
        is_head = module == "embed" and model.spec.tied
        adapter = tree.get(adapters, *(["head"] if is_head else _keys(module)))
        if computes(leaf):
            kind = "NF4" if isinstance(leaf, NF4) else "fp8"
            how = f"{kind}, product of fp8 rows (e4m3), backward too"
        elif isinstance(leaf, Fp8):
            how = "fp8, dequantized per use (torch) for a dense product"
        elif isinstance(leaf, NF4):
            how = f"NF4, dequantized per use ({kernel}) for a dense product"
        elif isinstance(leaf, Int8):
            how = "int8, product of 8-bit codes (torch), dequantized in backward"
        else:
            how = f"{str(leaf.dtype).removeprefix('torch.')}, {_use(model, module)}"
        if eight and axes == 2 and isinstance(leaf, NF4 | Fp8) and not takes(leaf.shape):
            how += f" (a side is no multiple of {MULTIPLE}, as fp8 products need)"
        if axes == 3:
            how = f"{stored.shape[0]} experts, each {how}"
        if model.qat_scheme and module not in ("embed", "head", "inputs.table"):
            how += f", rounded as {model.qat_scheme} with its adapter"
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            how += ", trained"
        if adapter is not None:
            kind = "LoRA" if adapter.magnitude is None else "DoRA"
            how += f"; {kind} r={adapter.rank} scale={adapter.scale:g} added into the product"
            how += f", dropout {adapter.dropout:g}" if adapter.dropout else ""
        lines.append(f"{module}: {how}")
    return "\n".join([*lines, _backward(model)])


def _use(model: "CausalLM", module: str) -> str:
    if module == "inputs.table":
        return "rows looked up"
    if module != "embed":
        return "dense product"
    return "rows looked up" + ("; as the head a dense product" if model.spec.tied else "")


def _backward(model: "CausalLM") -> str:
    if isinstance(model.residuals, Policy):
        fates = ((f.name, getattr(model.residuals, f.name)) for f in fields(Policy))
        text = "backward: " + ", ".join(f"{name} {fate}" for name, fate in fates)
    elif model.residuals == "auto":
        limit = "the free memory" if model.memory_budget is None else f"{model.memory_budget:,} B"
        plans = [f"\n  {plan}" for plan in model.plans.values()]
        text = f"backward: planned for {limit} at the first step of a shape" + "".join(plans)
    else:
        text = "backward: one policy for each layer"
    return text + _run_again(model)


def _run_again(model: "CausalLM") -> str:
    """What autograd runs again of the layers, whatever becomes of their residuals."""
    plain: dict[tuple[str, str], list[str]] = {}
    waits = experts_wait(model)
    for i, layer in enumerate(model.spec.layers):
        worn = tree.get(model.adapters, "layers", i)
        parts = runs_again(layer, worn, rounded=model.qat_scheme is not None, waits=waits[i])
        for found in parts.items():
            plain.setdefault(found, []).append(str(i))
    text = ""
    for (part, reason), layers in plain.items():
        what = PARTS.get(part, "all of it")
        text += f"\nlayers {', '.join(layers)}: {what} run again by autograd, for {reason}"
    return text


def _keys(path: str) -> list[str | int]:
    return [int(key) if key.isdigit() else key for key in path.split(".")]
