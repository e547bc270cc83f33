"""Good tiny checkpoints in every stored form that is read, as tensors and configs to be spoilt.

`FORMS[name]()` gives a `Stored`; `write(stored, folder)` makes a folder of it that loads.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corpus
import torch
from safetensors.torch import save_file

from purelm.convert import bnb_file
from purelm.quant import nf4

Tensors = dict[str, torch.Tensor]


@dataclass
class Stored:
    """What stands in a folder: one safetensors file, config.json, and further small files.

    keep: the `quantize` under which the stored codes are taken as they are.
    """

    tensors: Tensors
    config: dict[str, Any]
    keep: str | None = None
    text_only: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


FORMS: dict[str, Callable[[], Stored]] = {}


def _form(make: Callable[[], Stored]) -> Callable[[], Stored]:
    once = functools.cache(make)
    FORMS[make.__name__] = lambda: deepcopy(once())
    return make


def write(stored: Stored, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stored.config))
    save_file({n: t.contiguous() for n, t in stored.tensors.items()}, folder / "model.safetensors")
    for name, content in stored.files.items():
        (folder / name).write_bytes(content)
    return folder


def _drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _projections(
    parts_of: Callable[[str, torch.Tensor], Tensors], quantization: dict[str, Any], **more: Any
) -> Stored:
    """The corpus' Llama with what `parts_of` makes of each projection."""
    made: Tensors = {}
    for name, w in corpus.tensors().items():
        made |= parts_of(name, w) if "_proj.weight" in name else {name: w}
    return Stored(made, {**corpus.CONFIG, "quantization_config": quantization}, **more)


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=_drawn(1)).int()


@_form
def gptq() -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        (rows, columns), module = w.shape, name.removesuffix("weight")
        return {
            module + "qweight": _words(columns // 8, rows),
            module + "qzeros": _words(2, rows // 8),
            module + "scales": torch.rand(2, rows, generator=_drawn()).half() / 100,
            module + "g_idx": (torch.arange(columns) // (columns // 2)).int(),
        }

    return _projections(parts, {"quant_method": "gptq", "bits": 4, "group_size": 8})


@_form
def awq() -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        (rows, columns), module = w.shape, name.removesuffix("weight")
        return {
            module + "qweight": _words(columns, rows // 8),
            module + "qzeros": _words(2, rows // 8),
            module + "scales": torch.rand(2, rows, generator=_drawn()).half() / 100,
        }

    return _projections(parts, {"quant_method": "awq", "bits": 4, "version": "gemm"})


@_form
def int8() -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        module = name.removesuffix("weight")
        scale = w.abs().amax(1)
        return {
            name: (w / scale[:, None] * 127).round().to(torch.int8),
            module + "SCB": scale,
            module + "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return _projections(parts, quantization, keep="int8")


def _four(kind: str, double: bool) -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        return bnb_file.parts(name, nf4.quantize(w, double=double, kind=kind))

    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
    }
    return _projections(parts, quantization, keep="nf4")


@_form
def fp4() -> Stored:
    return _four("fp4", double=False)


@_form
def nf4_double() -> Stored:
    return _four("nf4", double=True)


def _fp8(end: str, quantization: dict[str, Any], keep: str) -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        rows = (1, 1) if end == "_scale_inv" else (len(w), 1)
        return {name: w.to(torch.float8_e4m3fn), name + end: torch.ones(rows)}

    return _projections(parts, quantization, keep=keep)


@_form
def fp8_block() -> Stored:
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return _fp8("_scale_inv", quantization, "fp8_block")


@_form
def fp8_row() -> Stored:
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return _fp8("_scale", quantization, "fp8")


@_form
def compressed_packed() -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        (rows, columns), module = w.shape, name.removesuffix("weight")
        return {
            module + "weight_packed": _words(rows, columns // 8),
            module + "weight_scale": torch.rand(rows, 2, generator=_drawn()).half() / 100,
            module + "weight_zero_point": _words(rows // 8, 2),
            module + "weight_g_idx": (torch.arange(columns) // (columns // 2)).int(),
            module + "weight_shape": torch.tensor(w.shape),
        }

    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return _projections(parts, {**quantization, "config_groups": groups})


@_form
def compressed_int8() -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        scale = w.abs().amax(1, keepdim=True) / 127
        return {name: (w / scale).round().to(torch.int8), name + "_scale": scale}

    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return _projections(parts, quantization)


@_form
def nvfp4() -> Stored:
    def parts(name: str, w: torch.Tensor) -> Tensors:
        rows, columns = w.shape
        if columns % 16:
            return {name: w}
        return {
            name: torch.randint(0, 256, (rows, columns // 2), generator=_drawn()).byte(),
            name + "_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            name + "_scale_2": torch.tensor(0.01),
        }

    return _projections(parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


@_form
def mxfp4() -> Stored:
    import tiny

    model = tiny.hf_model("gpt_oss", hidden_size=32, intermediate_size=32)
    made: Tensors = {}
    for name, w in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            shape = (w.shape[0], w.shape[2], w.shape[1] // 32)
            codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=_drawn())
            made[name + "_blocks"] = codes
            made[name + "_scales"] = torch.full(shape, 124, dtype=torch.uint8)
        else:
            made[name] = w
    config = json.loads(model.config.to_json_string()) | {"architectures": ["GptOssForCausalLM"]}
    return Stored(made, config | {"quantization_config": {"quant_method": "mxfp4"}})


@_form
def vision_language() -> Stored:
    tensors = {"language_model." + name: w for name, w in corpus.tensors().items()} | {
        "vision_tower.patch.weight": torch.ones(4, 4)
    }
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": corpus.CONFIG,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 4},
        "image_token_index": 259,
        "tie_word_embeddings": False,
    }
    return Stored(tensors, config, text_only=True)


# Protocol buffers, as sentencepiece writes them.


def _varint(value: int) -> bytes:
    out = b""
    while True:
        out += bytes([(value & 127) | (128 if value > 127 else 0)])
        value >>= 7
        if not value:
            return out


def _chunk(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def sentencepiece(pieces: Iterable[tuple[str, float, int]], kind: int = 2) -> bytes:
    """A `tokenizer.model` of (piece, score, kind) with the settings of a Llama."""
    content = b""
    for text, score, what in pieces:
        one = _chunk(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        content += _chunk(1, one + b"\x18" + _varint(what))
    trainer = b"\x18" + _varint(kind)
    normalizer = _chunk(1, b"identity") + b"\x20\x00\x28\x01"
    return content + _chunk(2, trainer) + _chunk(3, normalizer)


def pieces() -> list[tuple[str, float, int]]:
    bytes_ = [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    words = ["\u2581", "a", "b", "c", "ab", "\u2581a", "abc", "\u2581ab"]
    return [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *bytes_] + [
        (word, -float(i), 1) for i, word in enumerate(words)
    ]
