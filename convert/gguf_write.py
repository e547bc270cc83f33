"""Writing a model as GGUF files, adapters merged in, one tensor in memory at a time.

The `gguf` library lays out the file and quantizes; llama.cpp is not needed. The header is written
and read back before any weight: the model and the tokenizer that it describes must be those in
memory. The bytes of every tensor are read again at the end.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ArgumentError, ConfigError, LoadError, SaveError
from ..nn.spec import ModelSpec
from . import atomic, merge_plan
from .gguf_fields import architecture_of, check_same, expressed, model_fields
from .gguf_file import GGUFTensor, library, open_gguf
from .gguf_model import config_fields
from .gguf_names import ROPE_TENSORS
from .gguf_plan import METHODS, Planned, plan
from .gguf_tokenizer_write import check_tokenizer, tokenizer_fields
from .merge_tensor import digest
from .registry import FAMILIES
from .safetensors_file import opened, read_at
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .bridge import CausalLM

_MAX_HALF = 65504.0
# Weights that are quantized at a time.
_CHUNK = 1 << 22


def save_gguf(
    model: "CausalLM",
    folder: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
) -> list[Path]:
    """Write `model`, adapters merged in, into `folder` as one GGUF file for each method.

    The files are called NAME.METHOD.gguf after the model, and appear all or not at all; others in
    the folder stay. Methods: `METHODS`; biases and norms are always F32, and the embedding and the
    head are Q8_0 where the other matrices have fewer bits. Adapters are added in fp32 to the
    weights of the files that the model was loaded from (with LoftQ to what the quantized ones
    dequantize to), and rounded once. Where llama.cpp has no windows for a family, the context that
    the file announces ends with the window.

    Returns the paths. Raises ArgumentError for other methods (K-quants need llama.cpp's own
    `llama-quantize`, which takes an f16 or bf16 file) and without a tokenizer, ConfigError for a
    family or setting and TokenizerError for a tokenizer that the format cannot express, and
    SaveError for values that the type cannot hold and when the disk or the check fails.
    """
    methods = check_methods(quantization_method)
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ArgumentError("a GGUF file holds its tokenizer, and the model has none; give one")
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_transformers(tokenizer)
    atomic.check_apart(folder, model.origin.folder)
    with torch.no_grad():
        tensors, family = merge_plan.tensors(model), model.origin.family
        plans = {method: plan(tensors, method, model.spec, family) for method in methods}
        spec, fields = _model_fields(model, tensors)
        fields |= tokenizer_fields(tokenizer, model.spec.vocab)
        size = sum(tensor.nbytes for planned in plans.values() for tensor in planned)
        stem = _stem(model.origin.name)
        names = {method: f"{stem}.{method.upper()}.gguf" for method in methods}
        with atomic.folder(folder, need_bytes=size) as new:
            for method, planned in plans.items():
                path = new / names[method]
                try:
                    _write(path, fields, planned, method, spec, tokenizer)
                except LoadError as problem:
                    if isinstance(problem, ConfigError):
                        raise ConfigError(
                            f"a GGUF file cannot express this model: {problem}"
                        ) from problem
                    raise
    return [Path(folder, name) for name in names.values()]


def check_methods(asked: str | Sequence[str]) -> list[str]:
    """The methods in lower case, each once; raises ArgumentError for one that is not offered."""
    methods: list[Any] = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    found = []
    for method in methods:
        name = method.lower() if isinstance(method, str) else method
        name = {"fast_quantized": "q8_0"}.get(name, name)
        if name not in METHODS:
            raise ArgumentError(
                f"quantization_method is {method!r}, expected of {', '.join(METHODS)}; for "
                "K-quants write 'bf16' and run llama.cpp's llama-quantize on it"
            )
        found.append(name)
    if not found:
        raise ArgumentError(f"quantization_method is empty, expected of {', '.join(METHODS)}")
    return list(dict.fromkeys(found))


def _stem(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".") or "model"


def _model_fields(
    model: "CausalLM", tensors: Sequence[merge_plan.Tensor]
) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec that the file will stand for, and its fields."""
    family = model.origin.family
    architecture = architecture_of(family.model_type)
    head = family.names.to_hf("head.weight")
    tied = all(tensor.name != head for tensor in tensors)
    spec = expressed(model.spec, architecture, tied)
    return spec, model_fields(spec, architecture, _stem(model.origin.name))


def _write(
    path: Path,
    fields: dict[str, Any],
    planned: Sequence[Planned],
    method: str,
    spec: ModelSpec,
    tokenizer: Tokenizer,
) -> None:
    gguf = library()
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for name, value in {**fields, "general.file_type": METHODS[method][2]}.items():
        if name != "general.architecture":
            _add(writer, name, value)
    for tensor in planned:
        writer.add_tensor_info(
            tensor.name,
            tensor.stored,
            np.dtype(np.uint8),
            tensor.nbytes,
            gguf.GGMLQuantizationType[tensor.kind],
        )
    meant = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        first = next(tensor for tensor in planned if tensor.name not in ROPE_TENSORS)
        for tensor in planned:
            if tensor is first:
                _check_header(path, file, planned, spec, tokenizer)
            data = _stored(tensor)
            meant[tensor.name] = digest(torch.from_numpy(data))
            writer.write_tensor_data(data)
    finally:
        writer.close()
    _check_tensors(path, meant)


def _add(writer: Any, name: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }[type(value)]
    if value != []:
        add(name, value)


def _stored(tensor: Planned) -> np.ndarray[Any, Any]:
    """The tensor's bytes, [..., bytes of a row]; raises SaveError for values too large for it."""
    gguf = library()
    kind = gguf.GGMLQuantizationType[tensor.kind]
    dense = tensor.make()
    # Blocks have scales in half precision.
    if tensor.kind not in ("F32", "BF16") and float(dense.abs().max()) > _MAX_HALF:
        raise SaveError(
            f"{tensor.name} has values beyond {_MAX_HALF:g}, which {tensor.kind} cannot hold; take "
            "quantization_method 'bf16' or 'f32'"
        )
    rows = dense.reshape(-1, tensor.shape[-1]).numpy()
    made = np.empty((rows.shape[0], tensor.stored[-1]), dtype=np.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        part = gguf.quants.quantize(rows[first : first + step], kind)
        made[first : first + step] = part.view(np.uint8)
    return made


def _check_header(
    path: Path, file: Any, planned: Sequence[Planned], spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    """Raise unless the header stands for `spec` and `tokenizer`; weights may be missing yet."""
    file.flush()
    at = file.tell()
    os.truncate(path, at + sum(tensor.nbytes + 4096 for tensor in planned))
    try:
        written = open_gguf(path)
        found = config_fields(written)
        check_same(FAMILIES[found["model_type"]].spec(found, path), spec)
        check_tokenizer(written, tokenizer)
    finally:
        os.truncate(path, at)


def _check_tensors(path: Path, meant: dict[str, bytes]) -> None:
    written = open_gguf(path)
    if written.tensors.keys() != meant.keys():
        raise SaveError(f"{path.name} does not hold the tensors that were written")
    for name, info in written.tensors.items():
        if _digest(info) != meant[name]:
            raise SaveError(f"{name} reads back with other bytes than were written")


def _digest(info: GGUFTensor) -> bytes:
    found = torch.empty(info.nbytes, dtype=torch.uint8)
    with opened(info) as file:
        read_at(file, info, 0, found)
    return digest(found)
