"""Broken and hostile checkpoints, by name: each is a good tiny Llama with one thing wrong.

    for case in BROKEN:
        case.build(folder)      # folder is made, and filled by `good` first
        with pytest.raises(case.error): purelm.load(folder)

`stage` says what refuses it at the latest: "files" (`open_checkpoint`), "read" (reading every
tensor), "json" (`read_json` of config.json) or "load" (only what knows the model). Wherever a
file could lure a reader out of the folder, it points to `canary`, whose content must not be read.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save, save_file

from purelm.errors import CheckpointError, ConfigError, LoadError

Stage = Literal["files", "read", "json", "load"]
Tensors = dict[str, torch.Tensor]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Broken:
    """One broken checkpoint: `spoil` damages a folder that holds a good one."""

    name: str
    spoil: Callable[[Path], None]
    error: type[LoadError]
    stage: Stage

    def build(self, folder: Path) -> Path:
        good(folder)
        self.spoil(folder)
        return folder


def tensors() -> Tensors:
    """The weights of the good checkpoint, the same in every call."""
    c, generator = CONFIG, torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]),
        "model.norm.weight": (c["hidden_size"],),
        "lm_head.weight": (c["vocab_size"], c["hidden_size"]),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (16, 16),
            layer + "self_attn.k_proj.weight": (8, 16),
            layer + "self_attn.v_proj.weight": (8, 16),
            layer + "self_attn.o_proj.weight": (16, 16),
            layer + "mlp.gate_proj.weight": (24, 16),
            layer + "mlp.up_proj.weight": (24, 16),
            layer + "mlp.down_proj.weight": (16, 24),
            layer + "input_layernorm.weight": (16,),
            layer + "post_attention_layernorm.weight": (16,),
        }
    return {n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def good(folder: Path) -> Path:
    """A whole tiny Llama: config, byte-level BPE tokenizer, one safetensors file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "model_max_length": 64,
            }
        )
    )
    return folder


def sharded(folder: Path) -> dict[str, str]:
    """Split the good checkpoint in two shards with an index; returns its weight_map."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: found[n] for n in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def canary(folder: Path) -> Path:
    """A valid safetensors file beside the folder, which nothing may open."""
    outside = folder.parent / "canary.safetensors"
    save_file(tensors(), outside)
    return outside


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


BROKEN: list[Broken] = []


def broken(
    error: type[LoadError] = CheckpointError, stage: Stage = "files"
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
        BROKEN.append(Broken(spoil.__name__, spoil, error, stage))
        return spoil

    return add


def whole_file(name: str, content: bytes) -> None:
    """A case whose model.safetensors is just `content`."""
    BROKEN.append(
        Broken(name, lambda f: _write(f / "model.safetensors", content), CheckpointError, "files")
    )


def header_case(name: str, entry: str, data: bytes = bytes(64)) -> None:
    """A case whose header is the given JSON text."""
    whole_file(name, with_header(entry.encode(), data))


def config_case(name: str, stage: Stage = "load", **fields: object) -> None:
    """A case whose config.json differs in `fields`; None removes one."""

    def spoil(folder: Path) -> None:
        config = {k: v for k, v in (CONFIG | fields).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))

    BROKEN.append(Broken(name, spoil, ConfigError, stage))


def config_text(name: str, text: bytes) -> None:
    """A case whose config.json is the given text."""
    BROKEN.append(Broken(name, lambda f: _write(f / "config.json", text), ConfigError, "json"))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _change(folder: Path, change: Callable[[Tensors], object]) -> None:
    found = tensors()
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


# Files that are no safetensors file.
whole_file("empty_file", b"")
whole_file("seven_bytes", b"\x10\0\0\0\0\0\0")
whole_file("garbage", bytes(range(256)) * 8)
whole_file("git_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
whole_file("web_page", b"<!DOCTYPE html><html><body>404</body></html>")
whole_file("huge_header", (2**40).to_bytes(8, "little") + b"{}")
whole_file("header_length_all_ones", b"\xff" * 8 + b"{}")
whole_file("header_over_the_cap", with_header(b"{" + b" " * (17 << 20) + b"}"))
whole_file("header_not_utf8", with_header(b'{"\xff":{}}'))
whole_file("header_not_json", with_header(b"{tensors}"))
whole_file("header_a_list", with_header(b"[]      "))
whole_file("header_leading_space", with_header(b" {}     "))
whole_file("header_utf16", with_header("{}".encode("utf-16")))
whole_file("header_deep", with_header(b'{"a":' + b"[" * 100_000))
whole_file("header_deep_in_string", with_header(b'{"' + b'\\"' * 500_000 + b"[" * 100_000))
whole_file("tail_bytes", save(tensors()) + b"tail")

F32 = '"dtype":"F32","shape":[4],"data_offsets":'
header_case("offsets_overlap", f'{{"a":{{{F32}[0,16]}},"b":{{{F32}[8,24]}}}}', bytes(24))
header_case("offsets_hole", f'{{"a":{{{F32}[0,16]}},"b":{{{F32}[32,48]}}}}', bytes(48))
header_case("offsets_begin_late", f'{{"a":{{{F32}[16,32]}}}}', bytes(32))
header_case("offsets_reversed", f'{{"a":{{{F32}[16,0]}}}}', bytes(16))
header_case("offsets_beyond_the_file", f'{{"a":{{{F32}[0,16]}}}}', bytes(8))
header_case("offsets_negative", f'{{"a":{{{F32}[-16,0]}}}}', bytes(16))
header_case("offsets_three", f'{{"a":{{{F32}[0,16,32]}}}}', bytes(16))
header_case("offsets_float", f'{{"a":{{{F32}[0.0,16.0]}}}}', bytes(16))
header_case("duplicate_name", f'{{"a":{{{F32}[0,16]}},"a":{{{F32}[0,16]}}}}', bytes(16))
header_case("duplicate_field", f'{{"a":{{"dtype":"F64",{F32}[0,16]}}}}', bytes(16))
header_case("surplus_field", f'{{"a":{{"code":"x",{F32}[0,16]}}}}', bytes(16))
header_case("missing_field", '{"a":{"dtype":"F32","shape":[4]}}', bytes(16))
header_case("name_half_a_surrogate", f'{{"\\ud800":{{{F32}[0,16]}}}}', bytes(16))
header_case("metadata_not_strings", '{"__metadata__":{"a":1}}', b"")
_SHAPE = '{{"a":{{"dtype":"{}","shape":{},"data_offsets":[0,16]}}}}'
header_case("shape_does_not_match_offsets", _SHAPE.format("F32", "[5]"), bytes(16))
header_case("shape_minus_zero", _SHAPE.format("F32", "[-0]"), bytes(16))
header_case("shape_negative", _SHAPE.format("F32", "[-2,-2]"), bytes(16))
header_case("shape_true", _SHAPE.format("F32", "[4,true]"), bytes(16))
header_case("shape_overflow", _SHAPE.format("F32", "[4294967296,4294967297,4]"), bytes(16))
header_case("shape_overflow_times_zero", _SHAPE.format("F32", f"[{2**64 - 1},0]"), bytes(16))
header_case("dtype_unknown", _SHAPE.format("F31", "[4]"), bytes(16))
header_case("dtype_a_list", '{"a":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}}', bytes(16))


@broken()
def cut_in_the_data(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


@broken()
def cut_in_the_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 500)


@broken()
def too_many_tensors(folder: Path) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{i}":{entry}' for i in range(200_001)) + "}"
    _write(folder / "model.safetensors", with_header(header.encode()))


class _Payload:
    """Unpickled, it makes a folder where the test looks for it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@broken()
def pickle_named_safetensors(folder: Path) -> None:
    payload = pickle.dumps(_Payload(folder.parent / "executed"), protocol=2)
    _write(folder / "model.safetensors", payload)


@broken()
def zip_named_safetensors(folder: Path) -> None:
    payload = pickle.dumps(_Payload(folder.parent / "executed"), protocol=2)
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("model/data.pkl", payload)


@broken()
def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    payload = pickle.dumps(_Payload(folder.parent / "executed"), protocol=2)
    _write(folder / "pytorch_model.bin", payload)


@broken()
def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@broken()
def weights_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@broken()
def weights_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@broken()
def weights_a_device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


@broken()
def weights_link_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(canary(folder))


@broken()
def weights_link_loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


@broken()
def weights_link_dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone.safetensors")


def shard_name_case(name: str, shard: str) -> None:
    """A case whose index gives one tensor's shard as `shard` ({canary} is the canary's path)."""

    def spoil(folder: Path) -> None:
        outside = canary(folder)
        weight_map = sharded(folder)
        weight_map[DOWN] = shard.format(canary=outside)
        write_index(folder, weight_map)

    BROKEN.append(Broken(name, spoil, CheckpointError, "files"))


shard_name_case("index_dot_dot", "../canary.safetensors")
shard_name_case("index_dot_dot_inside", "sub/../../canary.safetensors")
shard_name_case("index_absolute", "{canary}")
shard_name_case("index_backslash", "..\\canary.safetensors")
shard_name_case("index_subfolder", "sub/model.safetensors")
shard_name_case("index_nul", "model\0.safetensors")
shard_name_case("index_newline", "model.safetensors\n")
shard_name_case("index_url", "file://{canary}")
shard_name_case("index_drive", "C:canary.safetensors")
shard_name_case("index_pickle", "pytorch_model.bin")
shard_name_case("index_empty_name", "")
shard_name_case("index_hidden", ".safetensors")
shard_name_case("index_unicode_slash", "..\u2215canary.safetensors")
shard_name_case("index_missing_shard", "model-00003-of-00002.safetensors")
shard_name_case("index_wrong_shard", "model-00001-of-00002.safetensors")


@broken()
def shard_link_out(folder: Path) -> None:
    sharded(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(canary(folder))


@broken()
def shard_cut(folder: Path) -> None:
    sharded(folder)
    os.truncate(folder / "model-00002-of-00002.safetensors", 700)


@broken()
def index_names_a_missing_tensor(folder: Path) -> None:
    write_index(folder, sharded(folder) | {"ghost": "model-00001-of-00002.safetensors"})


@broken()
def index_leaves_a_tensor_out(folder: Path) -> None:
    weight_map = sharded(folder)
    del weight_map[DOWN]
    write_index(folder, weight_map)


@broken()
def tensor_in_two_shards(folder: Path) -> None:
    weight_map = sharded(folder)
    first = next(iter(weight_map.values()))
    found = load_file(folder / first)
    found[DOWN] = torch.zeros(16, 24)
    save_file(found, folder / first)


def index_case(name: str, text: str) -> None:
    """A case whose index is the given text."""

    def spoil(folder: Path) -> None:
        sharded(folder)
        (folder / "model.safetensors.index.json").write_text(text)

    BROKEN.append(Broken(name, spoil, CheckpointError, "files"))


index_case("index_empty", "")
index_case("index_a_list", "[]")
index_case("index_without_map", "{}")
index_case("index_map_a_list", '{"weight_map": ["a"]}')
index_case("index_map_empty", '{"weight_map": {}}')
index_case("index_shard_a_number", '{"weight_map": {"a": 1}}')
index_case("index_duplicate", '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
index_case("index_deep", '{"weight_map": ' + "[" * 100_000)


@broken()
def index_link_out(folder: Path) -> None:
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    index.rename(folder.parent / "index.json")
    index.symlink_to(folder.parent / "index.json")


@broken(stage="read")
def bool_of_two(folder: Path) -> None:
    content = save(tensors() | {"flag": torch.tensor([True, False])})
    _write(folder / "model.safetensors", content[:-2] + b"\x02\x00")


# What only somebody who knows the model can see.
@broken(stage="load")
def tensor_missing(folder: Path) -> None:
    _change(folder, lambda t: t.pop(DOWN))


@broken(stage="load")
def tensor_extra(folder: Path) -> None:
    _change(folder, lambda t: t.update({"model.layers.2.mlp.down_proj.weight": t[DOWN].clone()}))


@broken(stage="load")
def tensor_shape(folder: Path) -> None:
    _change(folder, lambda t: t.update({DOWN: torch.zeros(16, 25)}))


@broken(stage="load")
def tensor_transposed(folder: Path) -> None:
    _change(folder, lambda t: t.update({DOWN: t[DOWN].T.contiguous()}))


@broken(stage="load")
def tensor_of_integers(folder: Path) -> None:
    _change(folder, lambda t: t.update({NORM: torch.ones(16, dtype=torch.int32)}))


@broken(stage="load")
def tensor_nan(folder: Path) -> None:
    _change(folder, lambda t: t[DOWN][3].fill_(float("nan")))


@broken(stage="load")
def tensor_infinite(folder: Path) -> None:
    _change(folder, lambda t: t[DOWN][3].fill_(float("inf")))


config_text("config_empty", b"")
config_text("config_cut", json.dumps(CONFIG).encode()[:100])
config_text("config_a_list", b"[]")
config_text("config_nan", json.dumps(CONFIG | {"rms_norm_eps": float("nan")}).encode())
config_text("config_infinite", json.dumps(CONFIG | {"rope_theta": float("inf")}).encode())
config_text("config_over_float64", json.dumps(CONFIG).replace("10000.0", "1e999").encode())
config_text("config_duplicate", json.dumps(CONFIG).replace("{", '{"vocab_size":1,', 1).encode())
config_text("config_deep", b'{"a":' + b"[" * 1_000_000)
config_text("config_bomb", b'{"a":[' + b"[]," * 6_000_000 + b"[]]}")
config_text("config_byte_order_mark", b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
config_text("config_not_utf8", b'{"model_type": "\xff"}')
config_text("config_long_number", b'{"vocab_size": ' + b"9" * 5000 + b"}")


@broken(ConfigError, "json")
def config_absent(folder: Path) -> None:
    (folder / "config.json").unlink()


@broken(ConfigError, "json")
def config_link_out(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


config_case("config_no_model_type", model_type=None)
config_case("config_unknown_model_type", model_type="lama")
config_case("config_model_type_a_list", model_type=["llama"])
config_case("config_hidden_size_text", hidden_size="16")
config_case("config_hidden_size_negative", hidden_size=-16)
config_case("config_layers_zero", num_hidden_layers=0)
config_case("config_layers_a_billion", num_hidden_layers=10**9)
config_case("config_heads_float", num_attention_heads=2.5)
config_case("config_kv_heads_do_not_divide", num_attention_heads=3, num_key_value_heads=2)
config_case("config_eps_negative", rms_norm_eps=-1e-5)
config_case("config_rope_theta_zero", rope_theta=0.0)
config_case("config_activation_unknown", hidden_act="__import__")
config_case("config_rope_type_unknown", rope_scaling={"rope_type": "spiral", "factor": 2.0})
config_case("config_tie_text", tie_word_embeddings="no")
