"""Saving a whole model: the very files it was loaded from, with what was trained put into them.

Names, dtypes, shards and headers stay as they are. One tensor is in memory at a time. What was
written is read again and checked before it takes its place.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, CheckpointError, SaveError
from ..nn import stacks, tree
from ..quant.nf4 import NF4
from . import atomic, fused, hub, merge_4bit, named_adapters, shard_size
from .adapter_write import save_adapter
from .bnb_file import Entry, Packed, entries, read_dense
from .config import Config
from .fused import Fused
from .fused_read import Turned
from .gguf_file import GGUFTensor
from .json_file import read_json
from .local_file import locate
from .merge_tensor import Change, Parts, changed, check_changed, digest, is_whole
from .safetensors_file import read_header
from .shards import Checkpoint, open_checkpoint, read
from .trained_base import belong_to_it, dequantized

if TYPE_CHECKING:
    from .bridge import CausalLM

_INDEX = "model.safetensors.index.json"
_NOT_YET = ("torchao", "fp8")
_FOUR_BITS = ("merged_4bit", "merged_4bit_forced")
_DEQUANTIZED = "merged_16bit_dequantized"
# A whole model must not lie beside an adapter, which its readers would apply once more.
_REPLACES = (*atomic.MODEL_FILES, *atomic.ADAPTER_FILES, "adapter_config.json")


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: stored as `info`, if that is given, with what changes, or by `make`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    info: Entry | Turned | None
    change: Change
    make: Callable[[], torch.Tensor] | None = None


def save_merged(
    model: "CausalLM",
    folder: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    max_shard_size: int | str | None = None,
) -> None:
    """Write `model` with its adapters merged in, whole or not at all.

    merged_16bit: every tensor of the files it was loaded from, plus scale * B @ A where an adapter
    is (added in fp32 and rounded once to the stored dtype), trained copies in place of what they
    copy, config, generation config and tokenizer (default: the model's own, else the source's
    files). A 4-bit model is merged into its 16-bit original, or, if its files are quantized, into
    what they dequantize to. merged_16bit_dequantized: into what the model's quantized weights
    dequantize to, which the adapter was trained on; with LoftQ merged_16bit is that too. lora: the
    adapter alone. merged_4bit (and merged_4bit_forced): 4-bit weights as bitsandbytes stores them,
    which loses accuracy where an adapter is: the sum with the dequantized weight is quantized
    again, a matrix that holds several projections as one; all else as merged_16bit. transformers
    has no experts in 4 bits: stacks of them raise, those that are stored one by one are for purelm
    alone. max_shard_size: of the files, in bytes or as "5GB" (default: each tensor in the file that
    it was in).

    Afterwards every written tensor is read again: its bytes must be those meant, and each merged
    weight must be what float64 makes of base and adapter, within rounding.

    Raises SaveError when the source files changed or vanished, for values that are not finite in
    the stored dtype, and when the check or the disk fails; NotImplementedError for other methods.
    """
    if save_method == "lora":
        save_adapter(model, folder, tokenizer)
        return
    if save_method in _NOT_YET:
        raise NotImplementedError(f"save_method={save_method!r} is not implemented yet")
    if save_method == "gguf":
        raise ArgumentError("GGUF files are written by save_pretrained_gguf")
    if save_method not in ("merged_16bit", _DEQUANTIZED, *_FOUR_BITS):
        raise ArgumentError(
            f"save_method is {save_method!r}, expected 'merged_16bit', {_DEQUANTIZED!r}, "
            "'merged_4bit' or 'lora'"
        )
    limit = None if max_shard_size is None else shard_size.to_bytes(max_shard_size)
    atomic.check_apart(folder, model.origin.folder)
    try:
        with torch.no_grad():
            _save(model, Path(folder), tokenizer, save_method, limit)
    except CheckpointError as problem:
        raise SaveError(
            f"the files that the model was loaded from cannot be merged into: {problem}"
        ) from problem


def _save(
    model: "CausalLM", folder: Path, tokenizer: Any, save_method: str, limit: int | None
) -> None:
    checkpoint = model.origin.checkpoint
    onto_trained = save_method == _DEQUANTIZED or belong_to_it(model.acting)
    config, shards = _planned(model, save_method in _FOUR_BITS, onto_trained)
    every = [tensor for shard in shards.values() for tensor in shard]
    if limit is not None:
        # What one weight in 4 bits consists of stays in one file.
        modules = [list(t) for _, t in groupby(every, lambda t: t.name.partition(".weight")[0])]
        files = shard_size.split(modules, lambda module: sum(map(_nbytes, module)), limit)
        shards = {name: list(chain.from_iterable(found)) for name, found in files.items()}
    size = sum(map(_nbytes, every))
    with atomic.folder(folder, need_bytes=size, replaces=_REPLACES) as new:
        meant: dict[str, bytes] = {}
        for name, tensors in shards.items():
            entries = [(t.name, t.dtype, t.shape, _maker(t, meant)) for t in tensors]
            atomic.write_safetensors(new / name, entries, _header(tensors))
        if list(shards) != [shard_size.SINGLE]:
            _write_index(checkpoint.folder / _INDEX, new / _INDEX, shards, size)
        _write_json(new / "config.json", config)
        if model.generation_config.fields:
            _write_json(new / "generation_config.json", model.generation_config.fields)
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        else:
            _copy_tokenizer(model.origin.folder, new)
        _verify(model, new, every, meant)


def _nbytes(tensor: Tensor) -> int:
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def tensors(model: "CausalLM") -> list[Tensor]:
    """What a merged 16-bit model consists of, under the names of its checkpoint."""
    fields, shards = _planned(model, False, belong_to_it(model.acting))
    tied = model.origin.family.spec(fields).tied
    names = model.origin.family.names
    # A head may be stored though it is the embedding.
    every = (t for shard in shards.values() for t in shard)
    return [t for t in every if not (tied and names.is_called(t.name, "head.weight"))]


def _planned(
    model: "CausalLM", four_bits: bool, onto_trained: bool
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The fields of config.json, and the tensors of each file to write.

    onto_trained: in 16 bits adapters are added to what quantized weights dequantize to.
    """
    checkpoint, names = model.origin.checkpoint, model.origin.family.names
    params = dict(tree.items(stacks.one_by_one(model.params)))
    trained = params if model.train_all else dict(tree.items(stacks.one_by_one(model.trained)))
    acting = named_adapters.acting(model.acting)  # without dropout, in training too
    worn = stacks.one_by_one(stacks.separated(acting))
    adapters = {f"{path}.weight": leaf for path, leaf in tree.items(worn)}
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    if four_bits:
        fields["quantization_config"] = merge_4bit.quantization_config(model)
    head = names.to_hf("head.weight")
    apart = model.spec.tied and "head.weight" in trained
    if apart:
        fields["tie_word_embeddings"] = False

    def change(path: str, info: Entry) -> Change:
        if path == "head.weight" and path not in params:
            path = "embed.weight"  # a tied head that is stored nevertheless
        leaf = params.get(path)
        if path in trained or (leaf is not None and tuple(leaf.shape) != info.shape):
            if not isinstance(leaf, torch.Tensor):
                raise SaveError(f"{info.name} was changed and is quantized, found {leaf!r}")
            return leaf
        return adapters.get(path)

    files = _files(checkpoint)
    shards: dict[str, list[Tensor]] = {name: [] for name in files.values()}
    for info in entries(checkpoint):
        add = shards[files[info.name]].append
        turned, whole = names.is_transposed(info.name), _whole(info, model, params)
        if whole is not None:
            leaves = [params[path] for path in whole.paths]
            if four_bits and any(isinstance(leaf, NF4) for leaf in leaves):
                for part in merge_4bit.of_fused(whole, leaves, adapters, info):
                    add(_made(*part))
                continue
            # In 4 bits it is [out, in] in any case.
            stored = Turned(info) if turned and isinstance(info, Packed) else info
            base = dequantized(stored, leaves, whole, turned) if onto_trained else stored
            changes = tuple(trained.get(path, adapters.get(path)) for path in whole.paths)
            kept = all(one is None for one in changes)
            put = None if kept else Parts(whole, changes, turned)
            add(Tensor(info.name, info.dtype, stored.shape, base, put))
            continue
        try:
            path = names.to_ours(info.name, params)
        except KeyError:
            path = ""
        leaf = params.get(path)
        if four_bits and isinstance(leaf, NF4):
            for part in merge_4bit.parts(info.name, leaf, adapters.get(path)):
                add(_made(*part))
            continue
        made = change(path, info) if path else None
        shape = tuple(made.shape) if isinstance(made, torch.Tensor) else info.shape
        # Weights of a GGUF file differ in dtype, and were trained against in the model's.
        dtype = model.dtype if isinstance(info, GGUFTensor) else info.dtype
        base = info
        if onto_trained and leaf is not None:
            base = dequantized(info, [leaf], None, False)
        add(Tensor(info.name, dtype, shape, base, made))
    if apart and not any(names.is_called(name, "head.weight") for name in checkpoint.tensors):
        weight = params["head.weight"]
        dtype = checkpoint.tensors[names.to_hf("embed.weight")].dtype
        last = list(shards)[-1]
        shards[last].append(Tensor(head, dtype, tuple(weight.shape), None, weight))
    return fields, shards


def _whole(info: Entry, model: "CausalLM", params: Mapping[str, Any]) -> Fused | None:
    """How a stored tensor consists of params; None where it is one of them, as it is."""
    names = model.origin.family.names
    if (found := fused.stored(info.name, names, model.spec, params)) is not None:
        return found
    if not names.is_transposed(info.name):
        return None
    path = names.to_ours(info.name)
    rows, *row = params[path].shape
    return Fused(info.name, (path,), (rows,), tuple(row))


def _made(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], torch.Tensor]
) -> Tensor:
    return Tensor(name, dtype, shape, None, None, make)


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor name -> plain name of the file that it is written into."""
    if not checkpoint.placed:  # of a GGUF file
        return dict.fromkeys(checkpoint.tensors, shard_size.SINGLE)
    return dict(sorted(checkpoint.placed.items(), key=lambda item: item[1]))


def dense(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is stored with its change, on the CPU; SaveError for values that are not finite."""
    if tensor.info is None or is_whole(tensor.change):
        return changed(torch.empty(tensor.shape, dtype=dtype), tensor.change, tensor.name)
    return changed(_stored(tensor.info).to(tensor.dtype).to(dtype), tensor.change, tensor.name)


def _stored(info: Entry | Turned) -> torch.Tensor:
    return read_dense(info.whole).mT.contiguous() if isinstance(info, Turned) else read_dense(info)


def _maker(tensor: Tensor, meant: dict[str, bytes]) -> Any:
    def make() -> torch.Tensor:
        made = dense(tensor, tensor.dtype) if tensor.make is None else tensor.make()
        meant[tensor.name] = digest(made)
        return made

    return make


def _header(tensors: list[Tensor]) -> dict[str, str]:
    infos = [tensor.info for tensor in tensors if tensor.info is not None]
    if any(isinstance(info, GGUFTensor) for info in infos):
        return {"format": "pt"}
    return read_header(infos[0].file)[1] if infos else {"format": "pt"}


def _write_index(source: Path, path: Path, shards: dict[str, list[Tensor]], size: int) -> None:
    index: dict[str, Any] = {}
    if source.is_file():
        index = read_json(source, max_bytes=64 << 20, error=CheckpointError)
    found = index.get("metadata")
    index["metadata"] = {**(found if isinstance(found, dict) else {}), "total_size": size}
    index["weight_map"] = {t.name: name for name, tensors in shards.items() for t in tensors}
    _write_json(path, index)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, new: Path) -> None:
    other = ("config.json", "generation_config.json", "quantize_config.json")
    templates = "additional_chat_templates"
    names = [n for n in hub.FILES if "/" not in n and "model.safetensors" not in n]
    for name in names:
        if name not in other and not name.startswith("adapter") and (source / name).exists():
            shutil.copyfile(locate(source, name), new / name)
    if (source / templates).is_dir():
        (new / templates).mkdir()
        for path in sorted((source / templates).glob("*.jinja")):
            shutil.copyfile(locate(source / templates, path.name), new / templates / path.name)


def _verify(model: "CausalLM", new: Path, every: list[Tensor], meant: dict[str, bytes]) -> None:
    """Raise SaveError unless the files in `new` hold what was meant, and that is right."""
    try:
        written = open_checkpoint(new)
        if written.tensors.keys() != meant.keys():
            raise SaveError(f"{new.name} does not hold the tensors that were written")
        for tensor in every:
            found = read(written.tensors[tensor.name])
            if digest(found) != meant[tensor.name]:
                raise SaveError(f"{tensor.name} reads back with other bytes than were written")
            if tensor.change is not None and not is_whole(tensor.change):
                assert tensor.info is not None
                base = _stored(tensor.info).to(tensor.dtype)
                check_changed(base, found, tensor.change, tensor.name)
        entries(written)
        # What will be loaded: the same spec, but for a head that is apart now.
        spec = model.origin.family.spec(Config.from_folder(new).fields, new / "config.json")
    except CheckpointError as problem:
        raise SaveError(f"what was written cannot be read: {problem}") from problem
    if spec.layers != model.spec.layers or (spec.vocab, spec.dim) != (
        model.spec.vocab,
        model.spec.dim,
    ):
        raise SaveError("the written config.json describes another model than the one in memory")
