"""What a merged model consists of: each tensor that is written, and what it is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SaveError
from ..nn import lora, stacks, tree
from ..quant.nf4 import NF4
from . import fused, merge_4bit, named_adapters, shard_size
from .bnb_file import Entry, Packed, entries, read_dense
from .fused import Fused
from .fused_read import Turned
from .gguf_file import GGUFTensor
from .merge_tensor import Change, Parts, changed, is_whole
from .shards import Checkpoint
from .trained_base import belong_to_it, dequantized

if TYPE_CHECKING:
    from .bridge import CausalLM


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: stored as `info`, if that is given, with what changes, or by `make`.

    made_from: what in memory it is made of besides.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    info: Entry | Turned | None
    change: Change
    make: Callable[[], torch.Tensor] | None = None
    made_from: tuple[Any, ...] = ()


def nbytes(tensor: Tensor) -> int:
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def tensors(model: "CausalLM") -> list[Tensor]:
    """What a merged 16-bit model consists of, under the names of its checkpoint."""
    fields, shards = planned(model, False, belong_to_it(model.acting))
    tied = model.origin.family.spec(fields).tied
    names = model.origin.family.names
    # A head may be stored though it is the embedding.
    every = (t for shard in shards.values() for t in shard)
    return [t for t in every if not (tied and names.is_called(t.name, "head.weight"))]


def planned(
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
    apart = model.spec.tied and ("head.weight" in trained or "head.weight" in adapters)
    if apart:
        fields["tie_word_embeddings"] = False

    def change(path: str, info: Entry) -> Change:
        # A tied head may be stored nevertheless; an adapter is its own.
        at = "embed.weight" if path == "head.weight" and path not in params else path
        leaf, adapter = params.get(at), adapters.get(path)
        if at in trained or (leaf is not None and tuple(leaf.shape) != info.shape):
            if not isinstance(leaf, torch.Tensor):
                raise SaveError(f"{info.name} was changed and is quantized, found {leaf!r}")
            return leaf if adapter is None else lora.merged(leaf.detach(), adapter)
        return adapter

    files = _files(checkpoint)
    shards: dict[str, list[Tensor]] = {name: [] for name in files.values()}
    for info in entries(checkpoint):
        add = shards[files[info.name]].append
        turned, whole = names.is_transposed(info.name), _whole(info, model, params)
        if whole is not None:
            leaves = [params[path] for path in whole.paths]
            if four_bits and any(isinstance(leaf, NF4) for leaf in leaves):
                worn = [adapters.get(path) for path in whole.paths]
                for part in merge_4bit.of_fused(whole, leaves, adapters, info):
                    add(_made(part, whole, info, *leaves, *worn))
                continue
            # In 4 bits it is [out, in] in any case.
            stored = Turned(info) if turned and isinstance(info, Packed) else info
            base = dequantized(stored, leaves, whole, turned) if onto_trained else stored
            changes = tuple(trained.get(path, adapters.get(path)) for path in whole.paths)
            kept = all(one is None for one in changes)
            put = None if kept else Parts(whole, changes, turned)
            from_memory = () if base is stored else tuple(leaves)
            add(Tensor(info.name, info.dtype, stored.shape, base, put, made_from=from_memory))
            continue
        try:
            path = names.to_ours(info.name, params)
        except KeyError:
            path = ""
        leaf = params.get(path)
        if four_bits and isinstance(leaf, NF4):
            for part in merge_4bit.parts(info.name, leaf, adapters.get(path)):
                add(_made(part, leaf, adapters.get(path)))
            continue
        made = change(path, info) if path else None
        shape = tuple(made.shape) if isinstance(made, torch.Tensor) else info.shape
        # Weights of a GGUF file differ in dtype, and were trained against in the model's.
        dtype = model.dtype if isinstance(info, GGUFTensor) else info.dtype
        base = info
        if onto_trained and leaf is not None:
            base = dequantized(info, [leaf], None, False)
        from_memory = () if base is info else (leaf,)
        add(Tensor(info.name, dtype, shape, base, made, made_from=from_memory))
    if apart and not any(names.is_called(name, "head.weight") for name in checkpoint.tensors):
        embed, last = names.to_hf("embed.weight"), list(shards)[-1]
        source = next(t for shard in shards.values() for t in shard if t.name == embed)
        made = change("head.weight", checkpoint.tensors[embed])
        shards[last].append(replace(source, name=head, change=made))
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


def _made(part: merge_4bit.Part, *made_from: Any) -> Tensor:
    name, dtype, shape, make = part
    return Tensor(name, dtype, shape, None, None, make, made_from)


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor name -> plain name of the file that it is written into."""
    if not checkpoint.placed:  # of a GGUF file
        return dict.fromkeys(checkpoint.tensors, shard_size.SINGLE)
    return dict(sorted(checkpoint.placed.items(), key=lambda item: item[1]))


def dense(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is stored with its change, on the CPU; SaveError for values that are not finite."""
    if tensor.info is None or is_whole(tensor.change):
        return changed(torch.empty(tensor.shape, dtype=dtype), tensor.change, tensor.name)
    return changed(stored(tensor.info).to(tensor.dtype).to(dtype), tensor.change, tensor.name)


def stored(info: Entry | Turned) -> torch.Tensor:
    return read_dense(info.whole).mT.contiguous() if isinstance(info, Turned) else read_dense(info)
