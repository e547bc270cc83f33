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
from ..nn.spec import MLPSpec, ModelSpec
from . import atomic, merge
from .bnb_file import read_dense
from .dense import with_attention
from .gguf_file import GGUFTensor, open_gguf
from .gguf_model import ROPE_FREQS, config_fields, ggml_name
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
# Hugging Face's model_type -> what llama.cpp calls such a model.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
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
    weights of the files that the model was loaded from, and rounded once. llama.cpp has no sliding
    window for these models: the context that the file announces ends with the window.

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
    import gguf

    matrix, outer, _ = METHODS[method]
    architecture = _architecture(model)
    first = next(model.spec.attentions())
    made = []
    for tensor in merge.tensors(model):
        name = ggml_name(tensor.name)
        if name is None:
            continue
        heads = 0
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = first.heads if ".attn_q." in name else first.kv_heads
        kind = "F32"
        if len(tensor.shape) > 1:
            kind = outer if name in ("token_embd.weight", "output.weight") else matrix
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        if tensor.shape[-1] % block:
            raise ArgumentError(
                f"{tensor.name} is {tensor.shape[-1]} wide, and {kind} stores blocks of {block}; "
                "take quantization_method 'bf16', 'f16' or 'f32'"
            )
        made.append(_Tensor(name, tensor.shape, kind, _maker(tensor, heads)))
    rope = first.rope
    if rope is not None and rope.kind == "llama3":
        at = torch.zeros(1, 1, dtype=torch.long)
        plain = inverse_frequencies(replace(rope, kind="default"), at)
        divisors = plain / inverse_frequencies(rope, at)
        # In front, so that it is there when the header is checked.
        made.insert(0, _Tensor(ROPE_FREQS, tuple(divisors.shape), "F32", lambda: divisors))
    return made


def _maker(tensor: merge.Tensor, heads: int) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        if isinstance(tensor.change, torch.Tensor):
            made = tensor.change.detach().to("cpu", torch.float32)
        else:
            assert tensor.info is not None
            made = read_dense(tensor.info).to(tensor.dtype).float()
            if tensor.change is not None:
                made = merged(made, tensor.change, tensor.name)
        if not bool(made.isfinite().all()):
            raise SaveError(f"{tensor.name} has values that are not finite")
        if heads:
            # llama.cpp turns neighbouring features: the halves of each head are interleaved.
            made = made.view(heads, 2, -1, *made.shape[1:]).transpose(1, 2).reshape(made.shape)
        return made

    return make


def _architecture(model: "CausalLM") -> str:
    family = model.origin.family.model_type
    if family not in _ARCHITECTURES:
        raise ConfigError(
            f"models of the family {family!r} are not written as GGUF; those that are: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[family]


def _model_fields(model: "CausalLM") -> tuple[ModelSpec, dict[str, Any]]:
    """The spec that the file will stand for, and its fields."""
    architecture, spec = _architecture(model), model.spec
    windows = [a.window for a in spec.attentions() if a.window is not None]
    context = min(spec.max_positions, *windows) if windows else spec.max_positions
    written = {tensor.name for tensor in merge.tensors(model)}
    tied = model.origin.family.names.to_hf("head.weight") not in written
    spec = replace(with_attention(spec, window=None), max_positions=context, tied=tied)
    first, mlp = next(spec.attentions()), spec.layers[0].mlp
    assert isinstance(mlp, MLPSpec)  # no architecture of `_ARCHITECTURES` has experts
    rope = first.rope
    if rope is None:
        raise ConfigError("a layer has no rotary embedding, which a GGUF file cannot say")
    own: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "context_length": context,
        "embedding_length": spec.dim,
        "block_count": len(spec.layers),
        "feed_forward_length": mlp.dim,
        "attention.head_count": first.heads,
        "attention.head_count_kv": first.kv_heads,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm.eps),
        "rope.dimension_count": rope.dim,
        "rope.freq_base": float(rope.theta),
    }
    if rope.kind in ("linear", "yarn"):
        own["rope.scaling.type"] = rope.kind
        own["rope.scaling.factor"] = float(rope.factor)
        if rope.kind == "yarn":
            own["rope.scaling.original_context_length"] = rope.original_positions
    elif rope.kind not in ("default", "llama3"):
        raise ConfigError(f"the rope scaling {rope.kind!r} cannot be put into a GGUF file")
    fields: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": _stem(model.origin.name),
        "general.quantization_version": 2,
    }
    return spec, fields | {f"{architecture}.{name}": value for name, value in own.items()}


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
        family = FAMILIES[written.fields["general.architecture"]]
        read = family.spec(found, path)
        if replace(read, init_std=spec.init_std) != spec:
            raise ConfigError(f"it would be read as {read!r:.900} and is {spec!r:.900}")
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
