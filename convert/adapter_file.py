"""Adapters in peft's own file format: adapter_config.json and adapter_model.safetensors, read.

Every tensor's place follows from its name, `base_model.model.<module>.lora_A.weight`; the config
says the scale. DoRA's magnitudes are `<module>.lora_magnitude_vector`. Copies of modules trained
whole are `<module>.weight`, biases `<module>.bias`, or `<module>.base_layer.bias` beside one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, ArgumentError, CheckpointError
from ..nn import stacks, tree
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from . import expert_adapters, rope_override
from .adapter_config import CONFIG, parse, read_config
from .adapter_fit import name_targets
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import (
    is_target,
    modules,
    parameters,
    projections,
    rank_and_scale,
    targetable,
)
from .shards import TensorInfo, open_checkpoint, read

STEM = "adapter_model"
PREFIX = "base_model.model."
# peft leaves the `.weight` of a magnitude out of its files, and takes both.
MAGNITUDE = "lora_magnitude_vector"
_LORA = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_(magnitude)_vector(?:\.weight)?)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_adapter(
    folder: str | Path, spec: ModelSpec, names: Names, *, params: tree.Tree | None = None
) -> tuple[tree.Tree, tree.Tree, PeftConfig]:
    """(adapters, trained copies, config) of a folder that peft or purelm wrote; CPU, fp32.

    params: the base's, needed only where an adapter trained the embedding of a tied model and left
    its head. Raises AdapterError for other methods than LoRA and DoRA, for tensors that are
    missing, unknown or misshapen, and for settings that cannot be followed.
    """
    folder = Path(folder)
    raw = read_config(folder)
    if raw is None:
        raise AdapterError(f"the folder has no {CONFIG}, so it is no adapter", file=folder)
    config = parse(raw, folder / CONFIG)
    place = folder / f"{STEM}.safetensors"
    try:
        stored = open_checkpoint(folder, stem=STEM)
        whole = expert_adapters.sorted_out(stored.tensors, spec, names, PREFIX)
        taken = {info.name for pair in whole.values() for info in pair.values()}
        rest = {name: info for name, info in stored.tensors.items() if name not in taken}
        pairs, found = _sorted_out(rest, spec, names, place)
        for path, pair in pairs.items():
            _check_pair(path, pair, config, names, spec, place)
        _check_complete(config, pairs, found, whole, spec, names, place)
        adapters = {
            path: LoRA(
                read(pair["A"]).float(),
                read(pair["B"]).float(),
                rank_and_scale(config, names.module_to_hf(path))[1],
                config.lora_dropout,
                read(pair["magnitude"]).float() if config.use_dora else None,
            )
            for path, pair in pairs.items()
        }
        known = parameters(spec, names)
        stacked = {
            path: expert_adapters.read(
                path,
                {kind: read(info) for kind, info in pair.items()},
                *rank_and_scale(config, known[path]),
                spec,
                names,
                place,
            )
            for path, pair in whole.items()
        }
        copies = {path: read(info).float() for path, info in found.items()}
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    _tie(copies, spec, params, place)
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        # The file's own expression is never run; the tensors say what it matched.
        have = {names.module_to_hf(path) for path in pairs}
        config = name_targets(config, have, spec, names)
    made = dict(tree.items(_stacked(adapters, place)))
    return tree.from_items(made | stacked), _stacked(copies, place), config


def _stacked(leaves: Mapping[str, Any], file: Path) -> tree.Tree:
    """The tree of these paths, with experts as stacks."""
    try:
        return stacks.together(tree.from_items(dict(leaves)))
    except ArgumentError as problem:
        raise AdapterError(str(problem), file=file) from problem


@dataclass(frozen=True)
class Trained:
    """What the files say of the base that the adapter was trained on, without reading a tensor.

    rope_scaling: what the base was loaded with, and stored_as: what its weights were kept in
    ("nf4", "int8"..., "16bit"), None where purelm did not write it down. vocab: the rows of the
    embedding or head that came with the adapter, 0 without.
    """

    rope_scaling: dict[str, Any] | None
    stored_as: str | None
    vocab: int


def read_trained(folder: Path, names: Names) -> Trained:
    """What the folder's tensors and their header say; AdapterError where they cannot be read."""
    try:
        stored = open_checkpoint(folder, stem=STEM)
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    text = stored.metadata.get("purelm.rope_scaling")
    file = folder / f"{STEM}.safetensors"
    copies = [PREFIX + names.to_hf(f"{module}.weight") for module in ("embed", "head")]
    rows = [stored.tensors[name].shape[:1] for name in copies if name in stored.tensors]
    return Trained(
        None if text is None else rope_override.from_text(text, file),
        stored.metadata.get("purelm.stored_as"),
        max((row[0] for row in rows if row), default=0),
    )


def _sorted_out(
    tensors: Mapping[str, TensorInfo], spec: ModelSpec, names: Names, file: Path
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Module path -> {"A", "B", "magnitude"?}, and path -> trained copy; in the model's order."""
    shapes = {path: p.shape for path, p in tree.items(stacks.each_spec(spec))}
    shapes.setdefault("head.weight", (spec.vocab, spec.dim))
    adaptable = {name: path for path, name in projections(spec, names).items()}
    everything = {name: path for path, name in modules(spec, names).items()}
    pairs: dict[str, dict[str, TensorInfo]] = {}
    copies: dict[str, TensorInfo] = {}
    unknown = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise AdapterError(f"found {tensor.dtype}, expected floats", tensor=name, file=file)
        plain = name.removeprefix(PREFIX)
        lora = _LORA.fullmatch(plain)
        if lora and lora[1] in adaptable:
            pairs.setdefault(adaptable[lora[1]], {})[lora[2] or lora[3]] = tensor
            continue
        module, _, kind = plain.rpartition(".")
        module = module.removesuffix(".base_layer") if kind == "bias" else module
        path = f"{everything.get(module)}.{kind}"
        if path not in shapes:
            unknown.append(name)
        elif tuple(tensor.shape) != shapes[path]:
            grown = path in ("embed.weight", "head.weight") and tensor.shape[0] > spec.vocab
            hint = f"; load the base with resize_model_vocab={tensor.shape[0]}" if grown else ""
            raise AdapterError(
                f"found shape {list(tensor.shape)}, expected {list(shapes[path])}{hint}",
                tensor=name,
                file=file,
            )
        else:
            copies[path] = tensor
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise AdapterError(
            f"tensors without a place in this model: {', '.join(unknown[:6])}{more}; the adapter "
            "is for another model or another method",
            file=file,
        )
    ordered = {path: pairs[path] for path in adaptable.values() if path in pairs}
    return ordered, {path: copies[path] for path in shapes if path in copies}


def _check_pair(
    path: str,
    pair: Mapping[str, TensorInfo],
    config: PeftConfig,
    names: Names,
    spec: ModelSpec,
    file: Path,
) -> None:
    name = names.module_to_hf(path)
    out, inp = tree.at(stacks.each_spec(spec), f"{path}.weight").shape
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


def _check_complete(
    config: PeftConfig,
    adapters: Mapping[str, Any],
    copies: Mapping[str, Any],
    whole: Mapping[str, Any],
    spec: ModelSpec,
    names: Names,
    file: Path,
) -> None:
    """Everything that the config names must be there; a regular expression is not run for it."""
    wanted = expert_adapters.missing(config, whole, spec, names)
    if not isinstance(config.target_modules, str) and not isinstance(config.exclude_modules, str):
        for path, name in targetable(config, spec, names).items():
            if path not in adapters and is_target(config, name):
                wanted.append(f"{PREFIX}{name}.lora_A.weight")
    if config.bias != "none":
        for path, _ in tree.items(stacks.each_spec(spec)):
            module, _, kind = path.rpartition(".")
            if (
                kind == "bias"
                and path not in copies
                and (config.bias == "all" or module in adapters)
            ):
                wanted.append(names.to_hf(path))
    for name in config.modules_to_save or ():
        if not any(names.to_hf(path).removesuffix(".weight").endswith(name) for path in copies):
            wanted.append(f"{name}.weight")
    if not adapters and not copies and not whole:
        wanted.append("any lora_A.weight")
    if wanted:
        more = f" and {len(wanted) - 6} more" if len(wanted) > 6 else ""
        raise AdapterError(f"tensors are missing: {', '.join(wanted[:6])}{more}", file=file)


def _tie(
    copies: dict[str, torch.Tensor], spec: ModelSpec, params: tree.Tree | None, file: Path
) -> None:
    """In a tied model an embedding trained alone leaves the head as it was: peft's rule."""
    if not spec.tied or "embed.weight" not in copies:
        return
    embed, head = copies["embed.weight"], copies.get("head.weight")
    if head is not None:
        if torch.equal(embed, head):
            del copies["head.weight"]
    elif params is None:
        raise AdapterError(
            "it trained the embedding apart from the head, which are one matrix in this model; "
            "give the base's params",
            tensor="embed_tokens.weight",
            file=file,
        )
    else:
        copies["head.weight"] = params["embed"]["weight"].detach().float().cpu().clone()
