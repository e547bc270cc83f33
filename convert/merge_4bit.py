"""Saving a model's 4-bit weights as bitsandbytes stores them, adapters put into them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, KernelError, SaveError
from ..nn import lora, stacks, tree
from ..nn.lora import LoRA
from ..quant import nf4
from ..quant.nf4 import NF4
from . import bnb_file, fused
from .bnb_file import Entry
from .fused import Fused

if TYPE_CHECKING:
    from .bridge import CausalLM

# Name, dtype, shape and what makes it.
Part = tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]


def quantization_config(model: "CausalLM") -> dict[str, Any]:
    """The field of config.json; raises ArgumentError for a model without 4-bit weights, SaveError
    for a family that transformers does not have in 4 bits.
    """
    params = dict(tree.items(stacks.one_by_one(model.params)))
    leaves = [leaf for leaf in params.values() if isinstance(leaf, NF4)]
    if not leaves:
        raise ArgumentError(
            "save_method='merged_4bit' stores 4-bit weights as they are, and the model has none; "
            "load it with load_in_4bit=True, or save with 'merged_16bit'"
        )
    names = model.origin.family.names
    if names.own_linear:
        raise SaveError(
            f"transformers has the projections of {model.origin.family.model_type} in a class of "
            "its own, which it does not load in 4 bits; save with 'merged_16bit'"
        )
    dense = [
        fused.module_to_hf(path.rpartition(".")[0], model.spec, names)
        for path, spec in tree.items(stacks.each_spec(model.spec))
        if spec.quantize and not isinstance(params[path], NF4)
    ]
    return bnb_file.config_fields(leaves, {names.module_to_hf("head"), *dense})


def parts(name: str, leaf: NF4, adapter: LoRA | None) -> list[Part]:
    """What stores `leaf` with its adapter, made when the first part is asked for."""
    return _laid_out(name, leaf, lambda: merged(leaf, adapter, name))


def of_fused(
    whole: Fused, leaves: Sequence[Any], adapters: Mapping[str, LoRA], info: Entry
) -> list[Part]:
    """What stores a fused matrix whose parts are `leaves`, each with its adapter, quantized anew.

    One that is stored as `info` in 4 bits and has no adapter stays to the bit. Raises SaveError for
    what has no such form: stacks of experts, and parts of which some are not in 4 bits.
    """
    if len(whole.paths) == 1:
        return parts(whole.name, leaves[0], adapters.get(whole.paths[0]))
    name, first = whole.name, next(leaf for leaf in leaves if isinstance(leaf, NF4))
    if any(stacks.place(path) for path in whole.paths):
        raise SaveError(
            f"{name} is one parameter of all experts, which transformers does not have in 4 bits; "
            "save with 'merged_16bit'"
        )
    if not all(isinstance(leaf, NF4) and leaf.kind == first.kind for leaf in leaves):
        raise SaveError(
            f"{name} holds several projections, of which some are not in 4 bits; save with "
            "'merged_16bit'"
        )
    worn = [adapters.get(path) for path in whole.paths]
    stored = info if isinstance(info, bnb_file.Packed) else None
    double = first.absmax_scale is not None
    if stored is not None:
        double = stored.absmax_scale is not None

    def make() -> NF4:
        if stored is not None and not any(worn):
            return bnb_file.read_leaf(stored, first.dtype)
        dense = torch.empty(sum(whole.rows), *whole.row)
        for i, (leaf, adapter) in enumerate(zip(leaves, worn, strict=True)):
            whole.put(dense, i, _dense(leaf, adapter).cpu())
        return _quantized(dense, replace(first, absmax_scale=scale), name)

    scale = first.absmax if double else None  # something or nothing
    like = replace(first, shape=torch.Size((sum(whole.rows), *whole.row)), absmax_scale=scale)
    return _laid_out(name, like, make)


def merged(leaf: NF4, adapter: LoRA | None, name: str) -> NF4:
    """`leaf` plus its adapter, added in fp32 and quantized as `leaf` is; `leaf` without one.

    Raises SaveError for a sum that is not finite.
    """
    return leaf if adapter is None else _quantized(_dense(leaf, adapter), leaf, name)


def _dense(leaf: NF4, adapter: LoRA | None) -> torch.Tensor:
    whole = nf4.dequantize(leaf, torch.float32)
    return whole if adapter is None else lora.merged(whole, adapter)


def _quantized(dense: torch.Tensor, like: NF4, name: str) -> NF4:
    double = like.absmax_scale is not None
    try:
        made = nf4.quantize(dense, block=like.block, double=double, name=name, kind=like.kind)
    except KernelError as problem:
        raise SaveError(f"{name} merged cannot be stored in 4 bits: {problem}") from problem
    return replace(made, dtype=like.dtype)


def _laid_out(name: str, like: NF4, make: Callable[[], NF4]) -> list[Part]:
    """The parts that store what `make` makes, which is laid out as `like`."""
    made: dict[str, torch.Tensor] = {}

    def take(part: str) -> torch.Tensor:
        if part not in made:
            made.update(bnb_file.parts(name, make()))
        return made.pop(part)

    return [
        (part, dtype, shape, partial(take, part))
        for part, dtype, shape in bnb_file.layout(name, like)
    ]
