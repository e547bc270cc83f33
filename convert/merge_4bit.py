"""Saving a model's 4-bit weights as bitsandbytes stores them, adapters put into them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, KernelError, SaveError
from ..nn import lora, stacks, tree
from ..nn.lora import LoRA
from ..quant import nf4
from ..quant.nf4 import NF4
from . import bnb_file

if TYPE_CHECKING:
    from .bridge import CausalLM

# Name, dtype, shape and what makes it.
Part = tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]


def quantization_config(model: "CausalLM") -> dict[str, Any]:
    """The field of config.json; raises ArgumentError for a model without 4-bit weights."""
    params = dict(tree.items(stacks.one_by_one(model.params)))
    leaves = [leaf for leaf in params.values() if isinstance(leaf, NF4)]
    if not leaves:
        raise ArgumentError(
            "save_method='merged_4bit' stores 4-bit weights as they are, and the model has none; "
            "load it with load_in_4bit=True, or save with 'merged_16bit'"
        )
    names = model.origin.family.names
    dense = [
        names.module_to_hf(path.rpartition(".")[0])
        for path, spec in tree.items(stacks.each_spec(model.spec))
        if spec.quantize and not isinstance(params[path], NF4)
    ]
    return bnb_file.config_fields(leaves, [names.module_to_hf("head"), *dense])


def parts(name: str, leaf: NF4, adapter: LoRA | None) -> list[Part]:
    """What stores `leaf` with its adapter, made when the first part is asked for."""
    made: dict[str, torch.Tensor] = {}

    def take(part: str) -> torch.Tensor:
        if part not in made:
            made.update(bnb_file.parts(name, merged(leaf, adapter, name)))
        return made.pop(part)

    return [
        (part, dtype, shape, partial(take, part))
        for part, dtype, shape in bnb_file.layout(name, leaf)
    ]


def merged(leaf: NF4, adapter: LoRA | None, name: str) -> NF4:
    """`leaf` plus its adapter, added in fp32 and quantized as `leaf` is; `leaf` without one.

    Raises SaveError for a sum that is not finite.
    """
    if adapter is None:
        return leaf
    dense = lora.merged(nf4.dequantize(leaf, torch.float32), adapter)
    try:
        made = nf4.quantize(
            dense, block=leaf.block, double=leaf.absmax_scale is not None, name=name
        )
    except KernelError as problem:
        raise SaveError(f"{name} merged cannot be stored in 4 bits: {problem}") from problem
    return replace(made, dtype=leaf.dtype)
