"""Whether an adapter's file holds what its config and the model say: all of it, in its shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..nn import stacks, tree
from ..nn.spec import ModelSpec
from . import expert_adapters, fused
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import is_target, rank_and_scale
from .shards import TensorInfo

PREFIX = "base_model.model."
# peft leaves the `.weight` of a magnitude out of its files, and takes both.
MAGNITUDE = "lora_magnitude_vector"


def check_pair(
    name: str,
    pair: Mapping[str, TensorInfo],
    paths: tuple[str, ...],
    config: PeftConfig,
    spec: ModelSpec,
    file: Path,
) -> None:
    """Raise AdapterError unless the tensors of the module `name`, our `paths` one above the other,
    are there in the right shapes.
    """
    specs, head = stacks.each_spec(spec), (spec.vocab, spec.dim)
    shapes = [head if p == "head" else tree.at(specs, f"{p}.weight").shape for p in paths]
    out, inp = sum(shape[0] for shape in shapes), shapes[0][1]
    rank, _ = rank_and_scale(config, name)
    wanted = {
        "A": (rank, inp),
        "B": (out, rank),
        **({"magnitude": (out,)} if config.use_dora else {}),
    }
    if "magnitude" in pair and not config.use_dora:
        raise AdapterError(
            "found a magnitude, and use_dora is not true in the config",
            tensor=pair["magnitude"].name,
            file=file,
        )
    for kind, shape in wanted.items():
        end = MAGNITUDE if kind == "magnitude" else f"lora_{kind}.weight"
        tensor = f"{PREFIX}{name}.{end}"
        if kind not in pair:
            raise AdapterError("the tensor is missing", tensor=tensor, file=file)
        if tuple(pair[kind].shape) != shape:
            raise AdapterError(
                f"found shape {list(pair[kind].shape)}, the config and the model make it "
                f"{list(shape)}",
                tensor=tensor,
                file=file,
            )


def check_complete(
    config: PeftConfig,
    known: Mapping[str, tuple[str, ...]],
    pairs: Mapping[str, Any],
    copies: Mapping[str, Any],
    whole: Mapping[str, Any],
    spec: ModelSpec,
    names: Names,
    file: Path,
) -> None:
    """Everything that the config names must be there; a regular expression is not run for it.

    known: our paths of each module that may have an adapter, pairs: modules that have one, copies:
    our paths, whole: of adapters of all experts.
    """
    adapted = {path for name in pairs for path in known[name]}
    wanted = expert_adapters.missing(config, whole, spec, names)
    if not isinstance(config.target_modules, str) and not isinstance(config.exclude_modules, str):
        for name, paths in known.items():
            if not adapted.issuperset(paths) and is_target(config, name):
                wanted.append(f"{PREFIX}{name}.lora_A.weight")
    if config.bias != "none":
        for path, _ in tree.items(stacks.each_spec(spec)):
            module, _, kind = path.rpartition(".")
            is_meant = config.bias == "all" or module in adapted
            if kind == "bias" and path not in copies and is_meant:
                wanted.append(fused.to_hf(path, spec, names))
    there = {fused.to_hf(path, spec, names).removesuffix(".weight") for path in copies}
    for name in config.modules_to_save or ():
        if not any(module.endswith(name) for module in there):
            wanted.append(f"{name}.weight")
    if not pairs and not copies and not whole:
        wanted.append("any lora_A.weight")
    if wanted:
        more = f" and {len(wanted) - 6} more" if len(wanted) > 6 else ""
        raise AdapterError(f"tensors are missing: {', '.join(wanted[:6])}{more}", file=file)
