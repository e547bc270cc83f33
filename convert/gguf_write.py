"""Writing a model as GGUF files, adapters merged in, one tensor in memory at a time.

The `gguf` library lays out the file and quantizes; llama.cpp is not needed. The header is written
and read back before any weight: the model and the tokenizer that it describes must be those in
memory. The bytes of every tensor are read again at the end.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ArgumentError, ConfigError, LoadError, SaveError
from ..nn.rope import inverse_frequencies
from ..nn.spec import AttentionSpec, ModelSpec, MoESpec
from . import atomic, merge
from .bnb_file import read_dense
from .gguf_architectures import Architecture, main_rope
from .gguf_fields import architecture_of, check_same, expressed, model_fields
from .gguf_file import GGUFTensor, open_gguf
from .gguf_model import config_fields
from .gguf_names import ROPE_FREQS, VECTORS, to_ggml
from .gguf_tokenizer_write import check_tokenizer, tokenizer_fields
from .merge_tensor import digest, merged
from .registry import FAMILIES
from .safetensors_file import opened, read_at
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .bridge import CausalLM

# The method: the type of matrices, of the embedding and the head (which suffer most from few
# bits), and the number that llama.cpp has for files like that.
METHODS = {
    "f32": ("F32", "F32", 0),
    "f16": ("F16", "F16", 1),
    "bf16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q5_1": ("Q5_1", "Q8_0", 9),
    "q5_0": ("Q5_0", "Q8_0", 8),
    "q4_1": ("Q4_1", "Q8_0", 3),
    "q4_0": ("Q4_0", "Q8_0", 2),
}
_MAX_HALF = 65504.0
# Weights that are quantized at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: `kind` is its ggml type, `make` gives it in fp32."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], torch.Tensor]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        import gguf

        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return (*self.shape[:-1], self.shape[-1] // block * nbytes)


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
    weights of the files that the model was loaded from, and rounded once. Where llama.cpp
    has no windows for a family, the context that the file announces ends with the window.

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
        plans = {method: _plan(model, method) for method in methods}
        spec, fields = _model_fields(model)
        fields |= tokenizer_fields(tokenizer, model.spec.vocab)
        size = sum(_nbytes(tensor) for plan in plans.values() for tensor in plan)
        stem = _stem(model.origin.name)
        names = {method: f"{stem}.{method.upper()}.gguf" for method in methods}
        with atomic.folder(folder, need_bytes=size) as new:
            for method, plan in plans.items():
                path = new / names[method]
                try:
                    _write(path, fields, plan, method, spec, tokenizer)
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


def _plan(model: "CausalLM", method: str) -> list[_Tensor]:
    """The tensors in the order of the file; raises for widths that are not whole blocks."""
    matrix, outer, _ = METHODS[method]
    family = model.origin.family
    architecture = architecture_of(family.model_type)
    first = next(model.spec.attentions())
    made: list[_Tensor] = []
    experts: dict[str, list[merge.Tensor]] = {}
    for tensor in merge.tensors(model):
        found = to_ggml(tensor.name, architecture, family.names)
        for index, name in enumerate(found):
            shape, make = tensor.shape, _maker(tensor, architecture, name, first)
            if "_exps." in name and len(shape) == 2:
                experts.setdefault(name, []).append(tensor)
                if len(experts[name]) > 1:
                    continue
                mixture = next(x.mlp for x in model.spec.layers if isinstance(x.mlp, MoESpec))
                shape, make = (mixture.experts, *shape), _stacker(experts[name])
            elif "_exps." in name:
                shape = (shape[0], shape[1] // len(found), shape[2])
                make = _slicer(make, index, len(found))
            elif name.split(".")[-2] in VECTORS:
                shape = shape[1:]
            made.append(_Tensor(name, shape, _kind(name, shape, matrix, outer), make))
            _check_width(made[-1], tensor.name)
    rope = main_rope(model.spec)
    if rope is not None and rope.kind == "llama3":
        at = torch.zeros(1, 1, dtype=torch.long)
        plain = inverse_frequencies(replace(rope, kind="default"), at)
        divisors = plain / inverse_frequencies(rope, at)
        # In front, so that it is there when the header is checked.
        made.insert(0, _Tensor(ROPE_FREQS, tuple(divisors.shape), "F32", lambda: divisors))
    return made


def _kind(name: str, shape: tuple[int, ...], matrix: str, outer: str) -> str:
    """The ggml type of a tensor: norms, biases and routers are always F32."""
    if len(shape) == 1 or name.endswith("norm.weight") or "ffn_gate_inp" in name:
        return "F32"
    return outer if name in ("token_embd.weight", "output.weight") else matrix


def _check_width(tensor: _Tensor, name: str) -> None:
    import gguf

    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]][0]
    if tensor.shape[-1] % block:
        raise ArgumentError(
            f"{name} is {tensor.shape[-1]} wide, and {tensor.kind} stores blocks of {block}; "
            "take quantization_method 'bf16', 'f16' or 'f32'"
        )


def _stacker(experts: list[merge.Tensor]) -> Callable[[], torch.Tensor]:
    """The matrices of all experts, in the order of their numbers."""

    def make() -> torch.Tensor:
        def number(tensor: merge.Tensor) -> int:
            return int(re.findall(r"\.experts\.(\d+)\.", tensor.name)[0])

        return torch.stack([_dense(tensor) for tensor in sorted(experts, key=number)])

    return make


def _slicer(make: Callable[[], torch.Tensor], index: int, count: int) -> Callable[[], torch.Tensor]:
    """The `index`-th of `count` matrices that each expert's rows hold."""

    def one() -> torch.Tensor:
        made = make()
        return made.view(len(made), count, -1, made.shape[-1])[:, index]

    return one


def _dense(tensor: merge.Tensor) -> torch.Tensor:
    """The tensor with its change, fp32; raises SaveError for values that are not finite."""
    if isinstance(tensor.change, torch.Tensor):
        made = tensor.change.detach().to("cpu", torch.float32)
    else:
        assert tensor.info is not None
        made = read_dense(tensor.info).to(tensor.dtype).float()
        if tensor.change is not None:
            made = merged(made, tensor.change, tensor.name)
    if not bool(made.isfinite().all()):
        raise SaveError(f"{tensor.name} has values that are not finite")
    return made


def _maker(
    tensor: merge.Tensor, architecture: Architecture, name: str, attention: AttentionSpec
) -> Callable[[], torch.Tensor]:
    """What makes the tensor as llama.cpp wants it."""
    heads = 0
    if architecture.permuted and (".attn_q." in name or ".attn_k." in name):
        heads = attention.heads if ".attn_q." in name else attention.kv_heads

    def make() -> torch.Tensor:
        made = _dense(tensor)
        if name.endswith("norm.weight"):
            made = made + architecture.offset
        if heads:
            # llama.cpp turns neighbouring features: the halves of each head are interleaved.
            made = made.view(heads, 2, -1, *made.shape[1:]).transpose(1, 2).reshape(made.shape)
        return made

    return make


def _model_fields(model: "CausalLM") -> tuple[ModelSpec, dict[str, Any]]:
    """The spec that the file will stand for, and its fields."""
    family = model.origin.family
    architecture = architecture_of(family.model_type)
    written = {tensor.name for tensor in merge.tensors(model)}
    tied = family.names.to_hf("head.weight") not in written
    spec = expressed(model.spec, architecture, tied)
    return spec, model_fields(spec, architecture, _stem(model.origin.name))


def _write(
    path: Path,
    fields: dict[str, Any],
    plan: list[_Tensor],
    method: str,
    spec: ModelSpec,
    tokenizer: Tokenizer,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for name, value in {**fields, "general.file_type": METHODS[method][2]}.items():
        if name != "general.architecture":
            _add(writer, name, value)
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name,
            tensor.stored,
            np.dtype(np.uint8),
            _nbytes(tensor),
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
        for index, tensor in enumerate(plan):
            if index == 0 and tensor.name != ROPE_FREQS:
                _check_header(path, file, plan, spec, tokenizer)
            data = _stored(tensor)
            meant[tensor.name] = digest(torch.from_numpy(data))
            writer.write_tensor_data(data)
            if index == 0 and tensor.name == ROPE_FREQS:
                _check_header(path, file, plan, spec, tokenizer)
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


def _stored(tensor: _Tensor) -> np.ndarray[Any, Any]:
    """The tensor's bytes, [..., bytes of a row]; raises SaveError for values too large for it."""
    import gguf

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


def _nbytes(tensor: _Tensor) -> int:
    return int(np.prod(tensor.stored, dtype=np.int64))


def _check_header(
    path: Path, file: Any, plan: list[_Tensor], spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    """Raise unless the header stands for `spec` and `tokenizer`; weights may be missing yet."""
    file.flush()
    at = file.tell()
    os.truncate(path, at + sum(_nbytes(tensor) + 4096 for tensor in plan))
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
