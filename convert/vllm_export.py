"""`model.to_vllm`: the base and its adapters as vLLM serves them, and the command that does."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import ArgumentError
from ..nn import tree
from ..nn.lora import LoRA
from . import atomic, expert_adapters, merge, named_adapters
from .adapter_write import described, write_adapter
from .trained_base import belong_to_it

if TYPE_CHECKING:
    from .bridge import CausalLM

BASE, ADAPTERS = "base", "adapters"
# What vLLM's --max-lora-rank may be (its LoRAConfig).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class VLLMExport:
    """What was written: the base's folder, of each adapter its name and folder, the greatest of
    their ranks rounded up to one that vLLM takes (0: no adapters), and the `command` that serves
    all of it, the text of which is `str`.
    """

    base: Path
    adapters: dict[str, Path]
    max_lora_rank: int
    command: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.command)


def to_vllm(
    model: "CausalLM",
    folder: str | Path,
    tokenizer: Any = None,
    *,
    merged: bool = False,
    save_method: str = "merged_16bit",
    selected_adapters: Sequence[str] | None = None,
) -> VLLMExport:
    """Write the base into `folder`/base and each adapter into `folder`/adapters/NAME, all of it or
    nothing, so that one vLLM serves the base and every adapter by its name.

    merged: write one model with the acting adapters merged in, and no adapters. save_method: of the
    base, "merged_16bit" or "merged_4bit" (bitsandbytes' 4 bits), see `merge.save_merged`.
    selected_adapters: which of them, all by default. vLLM knows one rank and scale an adapter:
    where modules differ in them, the scales are multiplied into B, and A and B filled with zeros.
    Beside adapters that began with LoftQ the base in 16 bits is what its quantized weights
    dequantize to.

    Raises ArgumentError for adapters that vLLM does not take beside a base (DoRA, modules trained
    whole, biases, experts' stacked parameters, ranks over 512), which `merged=True` takes; else as
    `merge.save_merged`.
    """
    if save_method not in ("merged_16bit", "merged_4bit", "merged_4bit_forced"):
        raise ArgumentError(
            f"save_method is {save_method!r}, expected 'merged_16bit' or 'merged_4bit'"
        )
    if merged and selected_adapters is not None:
        raise ArgumentError("merged=True merges the active adapters; leave selected_adapters out")
    for written in (Path(folder), Path(folder, BASE)):
        atomic.check_apart(written, model.origin.folder)
    names = [] if merged else list(model.worn)
    if selected_adapters is not None:
        names = list(named_adapters.chosen(selected_adapters, names))
    if save_method == "merged_16bit" and belong_to_it(model.worn[name] for name in names):
        save_method = "merged_16bit_dequantized"
    place, kinds = Path(folder).resolve(), (f"{BASE}/*", f"{ADAPTERS}/*")
    with (
        nullcontext() if merged else model.disable_adapter(),
        atomic.folder(folder, replaces=kinds) as new,
    ):
        ranks = [_write(model, name, new / ADAPTERS / name) for name in names]
        merge.save_merged(model, new / BASE, tokenizer, save_method)
    rank = max(ranks, default=0)
    most = next(allowed for allowed in (0, *RANKS) if allowed >= rank)
    places = {name: place / ADAPTERS / name for name in names}
    return VLLMExport(place / BASE, places, most, _command(place, places, most))


def _command(place: Path, adapters: dict[str, Path], rank: int) -> tuple[str, ...]:
    command = ["vllm", "serve", str(place / BASE), "--served-model-name", place.name]
    if adapters:
        command += ["--enable-lora", "--max-loras", str(len(adapters))]
        command += ["--max-lora-rank", str(rank), "--lora-modules"]
        command += [f"{name}={path}" for name, path in adapters.items()]
    return tuple(command)


def _write(model: "CausalLM", name: str, folder: Path) -> int:
    """Write an adapter as vLLM takes it; its rank. Raises ArgumentError where it takes none."""
    one, names = model.worn[name], model.origin.family.names
    adapters = named_adapters.acting([one], training=True)
    config, header = described(model, one)
    leaves: list[LoRA] = tree.leaves(adapters)
    _, whole = expert_adapters.taken_out(adapters, config, model.spec, names)
    rank = 0

    def even(modules: dict[str, LoRA]) -> dict[str, LoRA]:
        nonlocal rank
        rank = max(leaf.rank for leaf in modules.values())
        _require(rank <= RANKS[-1], name, f"rank {rank}, more than {RANKS[-1]}")
        return _even(modules, rank)

    _require(not tree.leaves(one.trained), name, "modules or biases trained whole")
    _require(tree.get(adapters, "head") is None, name, "factors of the head")
    _require(bool(leaves), name, "no LoRA factors")
    _require(all(leaf.magnitude is None for leaf in leaves), name, "magnitudes (DoRA)")
    _require(not whole, name, "factors of experts' stacked parameters")
    write_adapter(
        folder,
        adapters,
        model.spec,
        names,
        config=config,
        metadata=header,
        change=even,
        by_parameter=False,
    )
    return rank


def _require(fits: bool, name: str, what: str) -> None:
    if not fits:
        raise ArgumentError(
            f"adapter {name!r} has {what}, which vLLM does not take beside a base; pass "
            "merged=True, which merges the active adapters into it"
        )


@torch.no_grad()
def _even(modules: dict[str, LoRA], rank: int) -> dict[str, LoRA]:
    """The same changes with one rank and scale: as they are where they have them, else with scale
    1 and filled up with zeros.
    """
    if len({(leaf.rank, leaf.scale) for leaf in modules.values()}) == 1:
        return modules
    return {
        name: replace(
            leaf,
            a=F.pad(leaf.a, (0, 0, 0, rank - leaf.rank)),
            b=F.pad(leaf.b.float() * leaf.scale, (0, rank - leaf.rank)),
            scale=1.0,
        )
        for name, leaf in modules.items()
    }
