"""Saving a whole model: the very files it was loaded from, with what was trained put into them.

Names, dtypes, shards and headers stay as they are. One tensor is in memory at a time. What was
written is read again and checked before it takes its place.
"""

import json
import shutil
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, CheckpointError, SaveError
from . import atomic, hub, merge_journal, shard_size
from .adapter_write import save_adapter
from .bnb_file import entries
from .config import Config
from .gguf_file import GGUFTensor
from .json_file import read_json
from .local_file import locate
from .merge_plan import Tensor, dense, nbytes, planned, stored
from .merge_tensor import check_changed, digest, is_whole
from .safetensors_file import read_header
from .shards import open_checkpoint, read
from .trained_base import belong_to_it

if TYPE_CHECKING:
    from .bridge import CausalLM

_INDEX = "model.safetensors.index.json"
# Formats that other libraries make of a merged model.
_ELSEWHERE = {
    "fp8": "serve it with vLLM's quantization='fp8', or load it with load_in_fp8=True",
    "torchao": "quantize it with torchao's quantize_, which transformers' TorchAoConfig does while "
    "it loads",
}
_FOUR_BITS = ("merged_4bit", "merged_4bit_forced")
_DEQUANTIZED = "merged_16bit_dequantized"
# A whole model must not lie beside an adapter, which its readers would apply once more.
_REPLACES = (*atomic.MODEL_FILES, *atomic.ADAPTER_FILES, "adapter_config.json")


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

    Every written tensor is read again: its bytes must be those meant, and each merged weight must
    be what float64 makes of base and adapter, within rounding. A merge that was killed is taken up
    by the next one into the same folder, but on Windows: files that it wrote and checked, of the
    same base and the same adapters, are not made again. Until then they take their room in a hidden
    folder beside that, `.<name>.purelm-new-<16 digits>`, which may be deleted.

    Raises SaveError when the source files changed or vanished, for values that are not finite in
    the stored dtype, and when the check or the disk fails, and ArgumentError for other methods.
    """
    if save_method == "lora":
        save_adapter(model, folder, tokenizer)
        return
    if save_method in _ELSEWHERE:
        raise ArgumentError(
            f"save_method={save_method!r} is not written here: save with 'merged_16bit' and "
            f"{_ELSEWHERE[save_method]}"
        )
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
    config, shards = planned(model, save_method in _FOUR_BITS, onto_trained)
    every = [tensor for shard in shards.values() for tensor in shard]
    if limit is not None:
        # What one weight in 4 bits consists of stays in one file.
        modules = [list(t) for _, t in groupby(every, lambda t: t.name.partition(".weight")[0])]
        files = shard_size.split(modules, lambda module: sum(map(nbytes, module)), limit)
        shards = {name: list(chain.from_iterable(found)) for name, found in files.items()}
    size = sum(map(nbytes, every))
    headers = {name: _header(tensors) for name, tensors in shards.items()}
    fields, known = json.dumps(config, sort_keys=True), dict[int, bytes]()
    plan = {
        name: merge_journal.made_of(tensors, (fields, sorted(headers[name].items())), known)
        for name, tensors in shards.items()
    }
    with atomic.folder(folder, need_bytes=size, replaces=_REPLACES, take_up=True) as new:
        done = merge_journal.taken_up(new, plan)
        for name, tensors in shards.items():
            if name not in done:
                done[name] = _write(new / name, tensors, headers[name])
                merge_journal.note(new, plan, done)
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
        _check_whole(model, new, {tensor.name for tensor in every})
        merge_journal.close(new)


def _write(file: Path, tensors: list[Tensor], header: dict[str, str]) -> dict[str, bytes]:
    """Write one file and read it again; returns the fingerprint of each tensor."""
    meant: dict[str, bytes] = {}
    entries = [(t.name, t.dtype, t.shape, _maker(t, meant)) for t in tensors]
    atomic.write_safetensors(file, entries, header)
    try:
        written, _ = read_header(file)
        for tensor in tensors:
            found = read(written[tensor.name])
            if digest(found) != meant[tensor.name]:
                raise SaveError(f"{tensor.name} reads back with other bytes than were written")
            if tensor.change is not None and not is_whole(tensor.change):
                assert tensor.info is not None
                base = stored(tensor.info).to(tensor.dtype)
                check_changed(base, found, tensor.change, tensor.name)
    except (CheckpointError, KeyError) as problem:
        raise SaveError(f"what was written cannot be read: {problem}") from problem
    return meant


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


def _check_whole(model: "CausalLM", new: Path, every: set[str]) -> None:
    """Raise SaveError unless the files in `new` are a checkpoint of the model."""
    try:
        written = open_checkpoint(new)
        if written.tensors.keys() != every:
            raise SaveError(f"{new.name} does not hold the tensors that were written")
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
