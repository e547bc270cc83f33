"""Adapters written as peft would: the files that `adapter_file` reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SaveError
from ..nn import stacks, tree
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from . import atomic, base_mark, expert_adapters, fused_adapters, named_adapters, rope_override
from .adapter_check import MAGNITUDE, PREFIX
from .adapter_config import CONFIG
from .adapter_file import DROPOUT, RANKS, STEM
from .adapter_fit import fitted_stored
from .expert_parts import (
    has_place,
    is_joined_by_peft,
    namesakes,
    put_together,
    without_dropout,
)
from .fused_adapters import Stored
from .lora_config import PeftConfig
from .named_adapters import Adapter
from .names import Names
from .safetensors_write import Entry
from .trained_base import LOFTQ

if TYPE_CHECKING:
    from .bridge import CausalLM


def save_adapter(
    model: "CausalLM",
    folder: str | Path,
    tokenizer: Any = None,
    selected_adapters: Sequence[str] | None = None,
) -> None:
    """Write the adapters of `model` (default: all), and a tokenizer (default: its own), whole or
    not at all: the one called "default" into `folder`, each other into a folder of its name there.

    Raises SaveError when there are none, into the base model's own folder, or the disk refuses,
    and ArgumentError for names that are no adapter's.
    """
    worn = model.worn
    if not worn:
        raise SaveError(
            "the model has no adapter to save; add one with get_peft_model, or write the whole "
            "model with save_pretrained_merged"
        )
    origin = model.origin
    atomic.check_apart(folder, origin.folder)
    saved = named_adapters.chosen(
        list(worn) if selected_adapters is None else selected_adapters, list(worn)
    )
    files, base = {}, model.base_params
    for name in saved:
        one = worn[name]
        config, header = described(model, one)
        adapters = named_adapters.acting([one], training=True)
        within = "" if name == named_adapters.DEFAULT else name
        files[within] = _files(
            adapters, model.spec, origin.family.names, one.trained, config, header, base
        )
    _write(folder, files, model.tokenizer if tokenizer is None else tokenizer)


def described(model: "CausalLM", adapter: Adapter) -> tuple[PeftConfig, dict[str, str]]:
    """The config for a file of `adapter`, and what its header says of the base it belongs to."""
    origin = model.origin
    stored = {
        "stored_as": origin.quantize or "16bit",
        "base_revision": origin.revision,
        base_mark.KEY: base_mark.mark(origin.checkpoint),
    }
    if origin.rope_scaling is not None:
        stored["rope_scaling"] = rope_override.to_text(origin.rope_scaling)
    config = replace(
        adapter.config or PeftConfig(),
        base_model_name_or_path=origin.name,
        revision=origin.revision,
    )
    if config.init_lora_weights == LOFTQ:
        # peft would make such a start again where it loads one.
        config = replace(config, init_lora_weights=True)
        stored["start"] = LOFTQ
    return config, {key: value for key, value in stored.items() if value is not None}


def write_adapter(
    folder: str | Path,
    adapters: tree.Tree,
    spec: ModelSpec,
    names: Names,
    *,
    trained: tree.Tree = None,
    config: PeftConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    params: tree.Tree = None,
    change: Callable[[dict[str, LoRA]], dict[str, LoRA]] | None = None,
    by_parameter: bool = True,
) -> None:
    """Write trees of adapters and trained copies as peft would, whole or not at all.

    `config` is corrected where it does not describe the trees. metadata goes into the header of
    the safetensors file, where peft does not look. The tensors keep their dtype. params: the
    base's, needed where of a matrix that holds several projections some have DoRA's magnitude or a
    trained bias. change: what is written in place of the adapters by Hugging Face's modules.
    by_parameter: adapters of single experts as of the parameters of all, where peft knows nothing
    else; False keeps each expert's own names.
    """
    made = _files(adapters, spec, names, trained, config, metadata, params, change, by_parameter)
    _write(folder, {"": made}, tokenizer)


@dataclass(frozen=True)
class _Files:
    """What an adapter's two files hold: the config's text, the tensors, and their header."""

    config: str
    entries: list[Entry]
    header: dict[str, str]


def _files(
    adapters: tree.Tree,
    spec: ModelSpec,
    names: Names,
    trained: tree.Tree,
    config: PeftConfig | None,
    metadata: Mapping[str, str] | None,
    params: tree.Tree,
    change: Callable[[dict[str, LoRA]], dict[str, LoRA]] | None = None,
    by_parameter: bool = True,
) -> _Files:
    config, ranks = config or PeftConfig(), dict[str, fused_adapters.Ranks]()
    dropout = 0.0
    if by_parameter:
        adapters, config, dropout = without_dropout(adapters, config, spec, names)
    by_parameter &= has_place(config, [leaf for _, leaf in tree.items(adapters)])
    if by_parameter and not is_joined_by_peft(adapters, spec, names):
        adapters, config, ranks = put_together(adapters, config, spec, names)
    adapters, whole = expert_adapters.taken_out(adapters, config, spec, names)
    worn, copies = (dict(tree.items(stacks.one_by_one(x))) for x in (adapters, trained))
    stored = fused_adapters.as_stored(worn, copies, spec, names, params)
    if change is not None:
        stored = replace(stored, adapters=change(stored.adapters))
    shared = namesakes(spec, names) if by_parameter else set[str]()
    config = fitted_stored(config, stored, whole, shared, spec, names)
    tensors = {
        **_named(stored, spec, names),
        **{PREFIX + n: t for n, t in expert_adapters.named(whole, spec, names).items()},
    }
    entries = [atomic.entry(name, tensor.detach()) for name, tensor in tensors.items()]
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
    header = {"format": "pt", **{f"purelm.{k}": v for k, v in (metadata or {}).items()}}
    if dropout:
        header[DROPOUT] = str(dropout)
    if ranks := {**ranks, **stored.ranks}:
        header[RANKS] = fused_adapters.to_text(ranks)
    return _Files(text + "\n", entries, header)


def _write(folder: str | Path, files: Mapping[str, _Files], tokenizer: Any) -> None:
    """Each adapter's files into the folder of that name within `folder`, and a tokenizer there."""
    size = sum(atomic.entry_bytes(one.entries) for one in files.values())
    stale = [
        f"{within}/{pattern}" if within else pattern
        for within in files
        for pattern in atomic.ADAPTER_FILES
    ]
    with atomic.folder(folder, need_bytes=size, replaces=stale) as new:
        for within, one in files.items():
            place = new / within
            place.mkdir(exist_ok=True)
            atomic.write_safetensors(place / f"{STEM}.safetensors", one.entries, one.header)
            (place / CONFIG).write_text(one.config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def _named(stored: Stored, spec: ModelSpec, names: Names) -> dict[str, torch.Tensor]:
    """The tensors under peft's names."""
    found: dict[str, torch.Tensor] = {}
    for module, leaf in stored.adapters.items():
        found[f"{PREFIX}{module}.lora_A.weight"] = leaf.a
        found[f"{PREFIX}{module}.lora_B.weight"] = leaf.b
        if leaf.magnitude is not None:
            found[f"{PREFIX}{module}.{MAGNITUDE}"] = leaf.magnitude
    for name, tensor in stored.copies.items():
        module, _, kind = name.rpartition(".")
        base = ".base_layer" if kind == "bias" and module in stored.adapters else ""
        found[f"{PREFIX}{module}{base}.{kind}"] = tensor
    embed, head = (f"{names.module_to_hf(module)}.weight" for module in ("embed", "head"))
    if spec.tied and embed in stored.copies and head not in stored.copies:
        # peft trains the two apart, so both must be told the one matrix.
        found[f"{PREFIX}{head}"] = stored.copies[embed]
    return found
