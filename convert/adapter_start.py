"""What fresh adapters and trained copies start from, for a `PeftConfig` and a model's params."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import ArgumentError
from ..nn import dora, lora, lora_init, stacks, tree
from ..nn.decoder import head_weight
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from ..quant.linear import weight_of
from ..quant.nf4 import NF4
from . import expert_adapters
from .lora_config import PeftConfig
from .named_adapters import Adapter
from .names import Names
from .peft_targets import Plan
from .trained_base import LOFTQ

_DRAWN: dict[bool | str, lora_init.Start] = {
    True: "kaiming",
    False: "random",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}


def begin(
    config: PeftConfig,
    found: Plan,
    params: tree.Tree,
    spec: ModelSpec,
    names: Names,
    random_state: int,
    original: Callable[[str], torch.Tensor],
) -> Adapter:
    """fp32 adapters and trained copies, each on its weight's device.

    Drawn from a CPU generator of their own: one `random_state` gives the same adapters on every
    device and moves nobody else's generator. original(path): the weight that a quantized one was
    made of, which only LoftQ asks for. Raises ArgumentError where a start does not fit.
    """
    check_seed(random_state)
    generator = torch.Generator().manual_seed(random_state)
    inside = config.init_lora_weights not in _DRAWN
    loftq = config.init_lora_weights == LOFTQ
    place, whole = params["embed"]["weight"].device, dict[str, LoRA]()
    params, head = stacks.one_by_one(params), head_weight(params, spec)
    adapters = {}
    for path, (rank, scale) in found.adapted.items():
        weight = head if path == "head" else tree.at(params, path)["weight"]
        device = weight.device
        if loftq:
            a, b = _lost(path, weight, rank, scale, names.module_to_hf(path), original)
        elif inside:
            a, b = _inside(config, names.module_to_hf(path), weight, rank, scale, generator)
        else:
            kind = _DRAWN[config.init_lora_weights]
            a, b = lora_init.draw(weight.shape, rank, start=kind, generator=generator)
        leaf = LoRA(a.to(device), b.to(device), scale, config.lora_dropout)
        if config.use_dora:
            leaf = replace(leaf, magnitude=dora.lengths(weight, leaf))
        adapters[path] = leaf
    for path, (rank, scale) in found.whole.items():
        if inside:
            raise ArgumentError(
                f"init_lora_weights={config.init_lora_weights!r} starts inside one weight, and "
                f"{path} is a stack of experts; use another start, or target_modules"
            )
        shape, kind = expert_adapters.shape_of(path, spec), _DRAWN[config.init_lora_weights]
        whole[path] = lora.one(shape, rank, scale, generator=generator, start=kind, device=place)
    start = {}
    if inside and not loftq:
        start = {path: LoRA(x.a.clone(), x.b.clone(), x.scale) for path, x in adapters.items()}
    trained = {path: _copy(params, path) for path in found.trained}
    return Adapter(
        tree.from_items(dict(tree.items(stacks.together(tree.from_items(adapters)))) | whole),
        stacks.together(tree.from_items(trained)),
        stacks.together(tree.from_items(start)),
        config,
    )


def check_seed(random_state: int) -> None:
    """Raise ArgumentError unless a generator can begin with it."""
    if type(random_state) is not int or not 0 <= random_state < 2**63:
        raise ArgumentError(f"random_state is {random_state!r}, expected a natural number")


def _inside(
    config: PeftConfig,
    name: str,
    weight: Any,
    rank: int,
    scale: float,
    generator: torch.Generator,
) -> lora_init.Pair:
    """A start that is part of the weight itself."""
    kind = str(config.init_lora_weights)
    if not isinstance(weight, torch.Tensor):
        raise ArgumentError(
            f"init_lora_weights={kind!r} starts from the exact weights, and {name} is "
            "quantized; load with load_in_16bit=True, or use another start"
        )
    if rank > min(weight.shape):
        raise ArgumentError(
            f"init_lora_weights={kind!r} cannot give rank {rank} for {name} of shape "
            f"{list(weight.shape)}; lower r or set rank_pattern"
        )
    weight = weight.detach()
    if kind == "olora":
        return lora_init.olora(weight, rank)
    _, _, rounds = kind.partition("_niter_")
    return lora_init.pissa(
        weight, rank, scale, rounds=int(rounds) if rounds else None, generator=generator
    )


def _lost(
    path: str,
    weight: Any,
    rank: int,
    scale: float,
    name: str,
    original: Callable[[str], torch.Tensor],
) -> lora_init.Pair:
    """The leading part of what 4 bits lost (LoftQ, arXiv 2310.08659, with the quantized weight as
    it is: one round).
    """
    if not isinstance(weight, NF4):
        raise ArgumentError(
            f"init_lora_weights='loftq' starts from what 4 bits lose, and {name} is not in 4 bits; "
            "load with load_in_4bit=True, or use another start"
        )
    if rank > min(weight.shape):
        raise ArgumentError(
            f"init_lora_weights='loftq' cannot give rank {rank} for {name} of shape "
            f"{list(weight.shape)}; lower r or set rank_pattern"
        )
    whole = original(path).to(weight.device, torch.float32)
    return lora_init.pissa(whole - weight_of(weight, torch.float32).detach(), rank, scale)


def _copy(params: tree.Tree, path: str) -> torch.Tensor:
    # A tied head that is trained apart starts from the embedding.
    source = path if path != "head.weight" or "weight" in params.get("head", {}) else "embed.weight"
    leaf = tree.at(params, source)
    return weight_of(leaf, torch.float32).detach().clone()
