"""Adapters in peft's own file format: adapter_config.json and adapter_model.safetensors, read.

Every tensor's place follows from its name, `base_model.model.<module>.lora_A.weight`; the config
says the scale. DoRA's magnitudes are `<module>.lora_magnitude_vector`. Copies of modules trained
whole are `<module>.weight`, biases `<module>.bias`, or `<module>.base_layer.bias` beside one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, ArgumentError, CheckpointError
from ..nn import stacks, tree
from ..nn.decoder import head_weight
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from . import base_mark, expert_adapters, expert_parts, fused, fused_adapters, rope_override
from .adapter_check import PREFIX, check_complete, check_pair
from .adapter_config import CONFIG, parse, read_config
from .adapter_fit import fitted, name_targets
from .fused_read import Stored, reader, split, turned
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import adaptable, modules, parameters, rank_and_scale
from .shards import TensorInfo, open_checkpoint, read
from .trained_base import LOFTQ

STEM = "adapter_model"
# Which ranks of a fused projection's adapter are of which part, in the header.
RANKS = "purelm.ranks"
# What purelm trains it with where peft takes none, as beside adapters of experts.
DROPOUT = "purelm.dropout"
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
    config = expert_parts.as_modules(parse(raw, folder / CONFIG))
    place = folder / f"{STEM}.safetensors"
    try:
        checkpoint = open_checkpoint(folder, stem=STEM)
        whole = expert_adapters.sorted_out(checkpoint.tensors, spec, names, PREFIX)
        taken = {info.name for pair in whole.values() for info in pair.values()}
        rest = {name: info for name, info in checkpoint.tensors.items() if name not in taken}
        known = adaptable(config, spec, names)
        _leave_out_head(rest, spec, names, params)
        pairs, found = _sorted_out(rest, known, spec, names, place)
        for name, pair in pairs.items():
            check_pair(name, pair, known[name], config, spec, place)
        check_complete(config, known, pairs, found, whole, spec, names, place)
        stored = {
            name: LoRA(
                _finite(pair["A"]),
                _finite(pair["B"]),
                rank_and_scale(config, name)[1],
                config.lora_dropout,
                _finite(pair["magnitude"]) if config.use_dora else None,
            )
            for name, pair in pairs.items()
        }
        ranks = fused_adapters.from_text(checkpoint.metadata.get(RANKS, "{}"), place)
        adapters: dict[str, LoRA] = {}
        for name, leaf in stored.items():
            adapters |= _ours(name, leaf, known[name], ranks.get(name), config, spec, names)
        params_of_all = parameters(spec, names)
        stacked = {
            path: expert_adapters.read(
                path,
                {kind: _finite(info) for kind, info in pair.items()},
                *rank_and_scale(config, params_of_all[path]),
                spec,
                names,
                place,
            )
            for path, pair in whole.items()
        }
        of_any = reader(_finite)
        copies = {path: of_any(info) for path, info in found.items()}
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    if "head" in adapters and spec.tied and copies.keys() & {"embed.weight", "head.weight"}:
        raise AdapterError(
            "it trained the embedding whole and an adapter of the head, which are one matrix in "
            "this model; merge it with peft, which parts them",
            file=place,
        )
    _tie(copies, spec, params, place)
    if checkpoint.metadata.get("purelm.start") == LOFTQ:
        config = replace(config, init_lora_weights=LOFTQ)
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        # The file's own expression is never run; the tensors say what it matched.
        config = name_targets(config, set(pairs), known)
    apart = expert_parts.taken_apart(stacked, ranks, spec, names) if stacked else None
    if apart is not None:
        stacked, config = apart, replace(config, target_parameters=None)
    made = tree.from_items(dict(tree.items(_stacked(adapters, place))) | stacked)
    trained = _stacked(copies, place)
    if apart is not None or any(name in fused.modules(spec, names) for name in pairs):
        config = _of_parts(config, made, trained, spec, names, place)
    if (text := checkpoint.metadata.get(DROPOUT)) is not None and not config.lora_dropout:
        dropout = _fraction(text, place)
        made = tree.map(lambda leaf: replace(leaf, dropout=dropout), made)
        config = replace(config, lora_dropout=dropout)
    return made, trained, config


def _fraction(text: str, file: Path) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < 1:
        raise AdapterError(f"{DROPOUT} is {text!r:.60}, expected 0 to below 1", file=file)
    return found


def _finite(info: TensorInfo) -> torch.Tensor:
    """The tensor in fp32; raises AdapterError for values that are NaN or infinite."""
    tensor = read(info).float()
    if bad := int((~tensor.isfinite()).sum()):
        raise AdapterError(
            f"{bad} of {tensor.numel()} values are NaN or infinite; train it again or take an "
            "earlier checkpoint of it",
            tensor=info.name,
            file=info.file,
        )
    return tensor


def _ours(
    name: str,
    leaf: LoRA,
    paths: tuple[str, ...],
    ranks: fused_adapters.Ranks | None,
    config: PeftConfig,
    spec: ModelSpec,
    names: Names,
) -> dict[str, LoRA]:
    """The adapters, by our paths, that the one of the module `name` is."""
    one = fused.modules(spec, names).get(name)
    if one is None:
        return {paths[0]: leaf}
    every = config.use_dora or config.bias == "lora_only"
    return fused_adapters.apart(one, leaf, ranks, all_of_them=every)


def _of_parts(
    config: PeftConfig,
    adapters: tree.Tree,
    trained: tree.Tree,
    spec: ModelSpec,
    names: Names,
    file: Path,
) -> PeftConfig:
    """The config of a file as it is of the parts of fused projections."""
    try:
        made = fitted(config, adapters, trained, spec, names)
    except ArgumentError as problem:
        raise AdapterError(str(problem), file=file) from problem
    begun = config.init_lora_weights
    return replace(made, inference_mode=config.inference_mode, init_lora_weights=begun)


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
    embedding or head that came with the adapter, 0 without. base: the mark of its weights.
    """

    rope_scaling: dict[str, Any] | None
    stored_as: str | None
    vocab: int
    base: str | None


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
        stored.metadata.get(f"purelm.{base_mark.KEY}"),
    )


def _sorted_out(
    tensors: Mapping[str, TensorInfo],
    known: Mapping[str, tuple[str, ...]],
    spec: ModelSpec,
    names: Names,
    file: Path,
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, Stored]]:
    """Hugging Face's module -> {"A", "B", "magnitude"?}, and our path -> where its trained copy is
    stored; in the order of `known`, which has our paths of each module, and of the model.
    """
    shapes = dict(tree.items(stacks.each_spec(spec)))
    want = {path: p.shape for path, p in shapes.items()}
    want.setdefault("head.weight", (spec.vocab, spec.dim))
    everything = {name: path for path, name in modules(spec, names).items()}
    pairs: dict[str, dict[str, TensorInfo]] = {}
    copies: dict[str, Stored] = {}
    unknown = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise AdapterError(f"found {tensor.dtype}, expected floats", tensor=name, file=file)
        plain = name.removeprefix(PREFIX)
        lora = _LORA.fullmatch(plain)
        if lora and lora[1] in known:
            pairs.setdefault(lora[1], {})[lora[2] or lora[3]] = tensor
            continue
        module, _, kind = plain.rpartition(".")
        module = module.removesuffix(".base_layer") if kind == "bias" else module
        seen = turned(tensor) if names.is_transposed(f"{module}.{kind}") else tensor
        whole = fused.stored(f"{module}.{kind}", names, spec, shapes)
        if whole is not None and module in fused.modules(spec, names):
            copies |= split(seen, whole)
            continue
        path = f"{everything.get(module)}.{kind}"
        if path not in want:
            unknown.append(name)
        elif tuple(seen.shape) != want[path]:
            grown = path in ("embed.weight", "head.weight") and tensor.shape[0] > spec.vocab
            hint = f"; load the base with resize_model_vocab={tensor.shape[0]}" if grown else ""
            raise AdapterError(
                f"found shape {list(seen.shape)}, expected {list(want[path])}{hint}",
                tensor=name,
                file=file,
            )
        else:
            copies[path] = seen
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise AdapterError(
            f"tensors without a place in this model: {', '.join(unknown[:6])}{more}; the adapter "
            "is for another model or another method",
            file=file,
        )
    owners: dict[str, str] = {}
    for name in pairs:
        for path in known[name]:
            if owners.setdefault(path, name) != name:
                raise AdapterError(
                    f"{name} and {owners[path]} are the same weights; keep the adapter of one",
                    file=file,
                )
    ordered = {name: pairs[name] for name in known if name in pairs}
    return ordered, {path: copies[path] for path in want if path in copies}


def _leave_out_head(
    tensors: dict[str, TensorInfo], spec: ModelSpec, names: Names, params: tree.Tree | None
) -> None:
    """Take the head's frozen weight, which peft saves beside an adapter of it, out of `tensors`.

    Raises AdapterError where it is not the base's, as far as `params` tell.
    """
    head = f"{PREFIX}{names.module_to_hf('head')}"
    if f"{head}.lora_A.weight" not in tensors:
        return
    info = tensors.pop(f"{head}.base_layer.weight", None)
    ours = None if info is None or params is None else head_weight(params, spec)
    if info is None or not isinstance(ours, torch.Tensor):
        return
    found = read(info)
    if tuple(found.shape) == tuple(ours.shape):
        eps = max(torch.finfo(t.dtype).eps for t in (found, ours))
        pair = found.float(), ours.detach().float().cpu()
        if torch.allclose(*pair, rtol=eps, atol=torch.finfo(torch.float16).tiny):
            return
    raise AdapterError(
        "the head that the adapter was trained beside is another than this model's "
        f"({list(found.shape)}, {list(ours.shape)}); load the base that it belongs to",
        tensor=info.name,
        file=info.file,
    )


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
