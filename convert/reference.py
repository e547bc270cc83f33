"""A frozen model of what a model is now: the reference of preference trainers."""

import copy
from typing import TYPE_CHECKING

import torch

from ..nn import tree
from . import named_adapters

if TYPE_CHECKING:
    from .bridge import CausalLM


@torch.no_grad()
def frozen(model: "CausalLM") -> "CausalLM":
    """A model that computes what `model` computes now, and goes on doing so while that is trained.

    The base's weights are shared; what is trained is copied: acting adapters (none that change
    nothing yet), trained copies of modules, all weights under full fine-tuning. In eval mode.
    """
    from .bridge import CausalLM

    params = model.base_params
    if model.train_all:
        params = tree.map_tensors(torch.clone, model.in_dtype())
    made = CausalLM(
        model.spec,
        params,
        config=copy.deepcopy(model.config),
        generation_config=copy.deepcopy(model.generation_config),
        origin=model.origin,
        dtype=model.dtype,
        max_seq_length=model.max_seq_length,
        residuals=model.residuals,
        memory_budget=model.memory_budget,
        seed=model.dropout_seed,
    )
    made.tokenizer, made.cache_dtype = model.tokenizer, model.cache_dtype
    hosted = [t.data_ptr() for t in model.host_tables]
    made.host_tables = tuple(t for t in tree.tensors(made.base_params) if t.data_ptr() in hosted)
    acting = [one for one in model.acting if tree.leaves(one.trained) or _changes(one)]
    if acting:
        adapters = tree.map_tensors(torch.clone, named_adapters.acting(acting))
        trained = tree.map_tensors(torch.clone, named_adapters.trained(acting))
        made.set_adapters(adapters, trained, config=acting[0].config)
        made.set_adapter(named_adapters.DEFAULT, inference_mode=True)
    made.round_weights(model.qat_scheme)
    return made.eval()


def _changes(adapter: named_adapters.Adapter) -> bool:
    """Whether the adapter does more than nothing: one with a start, or of DoRA, always may."""
    leaves = tree.leaves(adapter.adapters)
    begun = bool(tree.leaves(adapter.start)) or any(leaf.magnitude is not None for leaf in leaves)
    return begun or any(bool(leaf.b.any()) for leaf in leaves)
