"""A checkpoint's tensors into a tree of params: read one at a time, placed, quantized, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ArgumentError, CheckpointError, ConfigError
from ..nn import stacks, tree
from ..nn.params import ParamSpec, param_specs
from ..nn.spec import ModelSpec
from ..quant.fp8_product import computing
from .bnb_file import Packed, check_config, entries
from .config import Config
from .encoded import Encoded, seen
from .free_memory import loading
from .fused_read import Stored, is_packed, leaf_reader, reader
from .gguf_file import GGUF, opened_in
from .gguf_model import checkpoint as gguf_checkpoint
from .gguf_model import config_fields
from .hub import resolve
from .match import LOADABLE, match
from .precision import QUANTIZERS, Compute, Quantize, check_compute, in_products
from .registry import Family, family_of
from .shards import Checkpoint, open_checkpoint
from .staging import Stager
from .stored_formats import check_plain, format_of
from .text_half import TextHalf, text_half


@dataclass(frozen=True)
class Loaded:
    """A model as it came from its files."""

    spec: ModelSpec
    params: tree.Tree
    config: Config
    family: Family
    checkpoint: Checkpoint
    stored_dtypes: tuple[torch.dtype, ...]
    left_out: tuple[str, ...] = field(default=())
    dequantized_from: str | None = None
    half: str | None = None


def load(
    name: str | Path,
    *,
    quantize: Quantize = None,
    compute: Compute = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quant_skip: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    text_only: bool = False,
    progress: bool = False,
) -> tuple[ModelSpec, tree.Tree]:
    """(spec, params) of a local folder, a GGUF file, or a hub repository.

    quantize: "nf4" stores every projection of the layers in 4 bits, "int8" in 8 bits a row
    (LLM.int8), "fp8" in e4m3 with a scale a row, "fp8_block" with one a block of 128 x 128; of a
    checkpoint that bitsandbytes stored in 4 bits "nf4" keeps those that are, as they are, and None
    dequantizes them; "int8" keeps what it stored in 8 bits, "fp8" and "fp8_block" what is stored in
    fp8. Weights in another quantized format (stored_formats.py, those for others) are dequantized
    first. compute: "fp8" for products of 4-bit and fp8 weights in fp8
    (quant/fp8_product.py). dtype: of the other
    tensors and of what quantized weights dequantize to (default: as stored; bfloat16 where that
    differs by tensor, and for fp8). device: default the
    first GPU if there is one, else the CPU. quant_skip: texts; a projection whose checkpoint name
    contains one stays unquantized. text_only: of a vision-language model the text half, which such
    a model needs.

    Raises SourceError, ConfigError or CheckpointError.
    """
    source = resolve(
        str(name),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    loaded = load_folder(
        source.folder,
        quantize=quantize,
        compute=compute,
        dtype=dtype,
        device=default_device() if device is None else torch.device(device),
        quant_skip=quant_skip,
        text_only=text_only,
        progress=progress,
    )
    return loaded.spec, loaded.params


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_folder(
    folder: Path,
    *,
    quantize: Quantize,
    compute: Compute = None,
    dtype: torch.dtype | None,
    device: torch.device,
    quant_skip: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    text_only: bool = False,
    progress: bool = False,
    gguf: GGUF | None = None,
) -> Loaded:
    """The model in `folder`, which may also be a GGUF file, whose header is `gguf` if that was read
    already; `overrides` replace config fields.

    text_only: the text half of a vision-language model, which `Loaded.half` then tells of.
    """
    if quantize not in (None, *QUANTIZERS):
        kinds = ", ".join(map(repr, QUANTIZERS))
        raise ArgumentError(f"quantize is {quantize!r}, expected {kinds} or None")
    check_compute(compute, quantize, device)
    if dtype is not None and dtype not in LOADABLE:
        raise ArgumentError(f"dtype is {dtype}, expected one of {LOADABLE}")
    if isinstance(quant_skip, str) or not all(isinstance(t, str) and t for t in quant_skip):
        raise ArgumentError(f"quant_skip is {quant_skip!r}, expected a list of texts")
    gguf = opened_in(Path(folder)) if gguf is None else gguf
    path = Path(folder) / "config.json" if gguf is None else gguf.file
    config, half = _config(Path(folder), gguf, text_only)
    config.update(dict(overrides or {}))
    stored, form = config.quantization_config, format_of(config.quantization_config, path)
    if form is not None:
        # What is loaded is no longer what the field says.
        config.fields.pop("quantization_config")
    prequantized = config.quantization_config is not None
    if prequantized:
        check_config(config.quantization_config, path)
        if quantize not in (None, "nf4"):
            raise ConfigError(
                "the checkpoint is stored in 4 bits, of which 8 bits cannot make more; load it "
                "with load_in_4bit=True, or the 16-bit original in 8",
                file=path,
            )
    family = family_of(config.fields, path)
    spec = family.spec(config.fields, path)
    family = family.of(spec)
    checkpoint = open_checkpoint(folder) if gguf is None else gguf_checkpoint(gguf)
    left_behind = None
    if half is not None:
        checkpoint, left_behind = half.checkpoint(checkpoint)
    if form is not None:
        checkpoint = seen(checkpoint, stored, form)
    elif gguf is None and not prequantized:
        own = family.names.single
        check_plain((name for name in checkpoint.tensors if not own(name)), path)
    found = entries(checkpoint)
    if prequantized != any(isinstance(entry, Packed) for entry in found):
        raise ConfigError(
            "quantization_config says that weights are stored in 4 bits, and none is; remove it"
            if prequantized
            else "weights are stored in 4 bits, and there is no quantization_config that says so",
            file=path,
        )
    chosen, left_out = match(found, checkpoint, spec, family)
    for text in quant_skip:
        if not any(text in name for name in checkpoint.tensors):
            raise ArgumentError(f"quant_skip has {text!r}, which is in no tensor's name")
    if dtype is None:
        dtype = _common_dtype(chosen, spec)
    if prequantized and quantize is None:
        config.fields.pop("quantization_config")
    read = partial(_read_all, chosen, spec, quantize, compute, dtype, device, quant_skip, progress)
    params = loading(read, spec, quantize, dtype, device)
    dtypes = tuple(dict.fromkeys(info.dtype for info in chosen.values()))
    kept = any(isinstance(info, Encoded) and info.kept(quantize) for info in chosen.values())
    undone = None if form is None or kept else form.name
    return Loaded(spec, params, config, family, checkpoint, dtypes, left_out, undone, left_behind)


def read_config(folder: Path, gguf: GGUF | None, *, text_only: bool = False) -> Config:
    """The config of a model folder, or of its text half, or the one that `gguf`, the GGUF file
    there, stands for.
    """
    return _config(folder, gguf, text_only)[0]


def _config(folder: Path, gguf: GGUF | None, text_only: bool) -> tuple[Config, TextHalf | None]:
    if gguf is not None:
        return Config(config_fields(gguf), str(gguf.file)), None
    config = Config.from_folder(folder)
    half = text_half(config, folder / "config.json") if text_only else None
    return (config if half is None else half.config), half


def _common_dtype(chosen: Mapping[str, Stored], spec: ModelSpec) -> torch.dtype:
    want = tree.items(stacks.each_spec(spec))
    found = {chosen[path].dtype for path, p in want if not p.wide}
    return found.pop() if len(found) == 1 else torch.bfloat16


def _finite(made: torch.Tensor, info: Stored) -> torch.Tensor:
    """`made` if no value of it is NaN or infinite; aminmax needs no second tensor to tell."""
    if not all(bool(end.isfinite()) for end in made.aminmax()):
        count = int((~made.isfinite()).sum())
        advice = "repair the checkpoint"
        if made.dtype != info.dtype:
            advice += f", or load it as {info.dtype} if they fit that"
        raise CheckpointError(
            f"{count} of {made.numel()} values are NaN or infinite in {made.dtype}; {advice}",
            tensor=info.name,
            file=info.file,
        )
    return made


def _read_all(
    chosen: Mapping[str, Stored],
    spec: ModelSpec,
    quantize: Quantize,
    compute: Compute,
    dtype: torch.dtype,
    device: torch.device,
    quant_skip: Sequence[str],
    progress: bool,
) -> tree.Tree:
    want: dict[str, ParamSpec] = dict(tree.items(stacks.each_spec(spec)))
    specs: dict[str, ParamSpec] = dict(tree.items(param_specs(spec)))
    waiting: dict[str, dict[int, Any]] = {}
    # What a 4-bit checkpoint keeps in 16 bits stays so.
    stored_packed = any(is_packed(info) for info in chosen.values())
    make = None if quantize is None or stored_packed else QUANTIZERS[quantize]
    leaves: dict[str, Any] = {}
    total = sum(info.nbytes for info in chosen.values())
    shown = None if progress else True  # None: where there is a terminal
    with (
        Stager(device) as stager,
        tqdm(
            total=total, unit="B", unit_scale=True, desc="loading", disable=shown, leave=False
        ) as bar,
    ):
        read_stored, read_packed = reader(stager.read), leaf_reader(stager.read, dtype)
        stager.plan(chosen.values())
        for path, info in chosen.items():
            may = want[path].quantize and not any(text in info.name for text in quant_skip)
            leaf: Any
            if is_packed(info):
                # What computes with 16 bits only, the head for one, loses nothing by that.
                leaf = read_packed(info, quantize is not None and may)
            elif may and isinstance(info, Encoded) and (kept_leaf := info.kept(quantize)):
                leaf = kept_leaf(*map(stager.read, info.parts), dtype)
            else:
                stored = read_stored(info)
                dense = _finite(stored.to(torch.float32 if want[path].wide else dtype), info)
                leaf = make(dense, name=info.name) if make is not None and may else dense
            if compute == "fp8" and in_products(path, spec):
                leaf = computing(leaf)
            place = stacks.place(path)
            if place is None:
                leaves[path] = leaf
            else:
                # The experts of a layer are put together as soon as the last of them was read.
                whole, number = place
                each = waiting.setdefault(whole, {})
                each[number] = leaf
                if len(each) == specs[whole].shape[0]:
                    del waiting[whole]
                    leaves[whole] = stacks.joined_leaf([each[i] for i in range(len(each))], whole)
                del each
            del leaf
            bar.update(info.nbytes)
    # In the order of the spec, so that trees of equal models are equal in order too.
    return tree.from_items({path: leaves[path] for path in specs})
