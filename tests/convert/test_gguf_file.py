"""GGUF files: the logits and ids of the Hugging Face folders that they came from."""

import json
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import assets
import bridged
import gguf
import numpy as np
import pytest
import tiny
import tiny_tokenizers
import torch
import transformers

import purelm
from purelm.convert import gguf_file
from purelm.convert.gguf_file import find, open_gguf, read_tensor
from purelm.convert.gguf_tokenizer import read_tokenizer
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    PurelmError,
    SourceError,
    TokenizerError,
)
from purelm.nn import decoder, lora, tree
from purelm.quant.nf4 import NF4

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces\n\n\ttab ",
    "\u00dcn\u00efc\u00f6d\u00e9 \u65e5\u672c \U0001f642 123456 don't DON'T",
    "",
    "<s>x</s><|im_end|>\n",
]
TO_GGUF = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
}
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
SMALL = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
Fields = dict[str, Any]


def ggml_name(name: str) -> str:
    *front, module, leaf = name.split(".")
    number = f"blk.{front[2]}." if "layers" in front else ""
    return f"{number}{TO_GGUF[module]}.{leaf}"


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp stores q and k of Llama: the halves of each head interleaved."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def fields_of(config: Any) -> Fields:
    arch = config.model_type
    rope = config.rope_parameters
    return {
        "general.architecture": arch,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": getattr(config, "head_dim", None) or 64,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
    }


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if model.config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = model.config.num_attention_heads
            array = permuted(array, heads if ".q_proj." in name else 2)
        found[ggml_name(name)] = array
    return found


def write(
    path: Path, fields: Fields, tensors: dict[str, np.ndarray], kind: str = "F32"
) -> dict[str, np.ndarray]:
    """Write a file with the gguf library; the values that its tensors stand for."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for name, value in fields.items():
        if name == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_array(name, value)
    meant = {}
    for name, array in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        with np.errstate(all="ignore"):
            data = gguf.quants.quantize(array, stored)
            meant[name] = gguf.quants.dequantize(data, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_the_dequantized_weights(
    family: str, kind: str, tmp_path: Path
) -> None:
    tied = {"tie_word_embeddings": kind == "Q8_0"}
    sizes = SIZES if family != "qwen2" else {k: v for k, v in SIZES.items() if k != "head_dim"}
    model = tiny.hf_model(family, **sizes, **tied)
    names = {ggml_name(name): name for name in model.state_dict()}
    meant = write(tmp_path / "m.gguf", fields_of(model.config), tensors_of(model), kind)
    state = {}
    for name, array in meant.items():
        if family == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = 4 if ".attn_q." in name else 2
            array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2)
            array = array.reshape(meant[name].shape)
        state[names[name]] = torch.from_numpy(np.ascontiguousarray(array))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    spec, params = purelm.load(tmp_path / "m.gguf", device="cpu", dtype=torch.float32)
    assert spec.tied == (kind == "Q8_0")
    with torch.no_grad():
        want = model(bridged.ids()).logits
        bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)
        four_spec, four = purelm.load(tmp_path, quantize="nf4", device="cpu")
    assert four_spec == spec and len(tree.leaves(four)) == len(tree.leaves(params))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(kind: str, tmp_path: Path) -> None:
    """Random blocks, since the gguf library cannot make these: what it makes of them is read."""
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 60, (6, 2 * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = open_gguf(tmp_path / "k.gguf").tensors["token_embd.weight"]
    assert info.shape == (6, 2 * block) and info.kind == kind
    want = torch.from_numpy(gguf.quants.dequantize(data, number))
    assert torch.equal(read_tensor(info), want) and bool(want.isfinite().all())


def test_rope_scaling(tmp_path: Path) -> None:
    """Llama 3.1's divisors, linear and YaRN, as transformers computes them."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    for rope in (llama3, linear, yarn):
        sizes = {**SIZES, "max_position_embeddings": 64}
        model = tiny.hf_model("llama", rope_parameters=rope, **sizes)
        fields, tensors = fields_of(model.config), tensors_of(model)
        if rope is llama3:
            inv = model.model.rotary_emb.inv_freq
            plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
            tensors["rope_freqs.weight"] = (plain / inv).numpy()
        else:
            fields["llama.rope.scaling.type"] = rope["rope_type"]
            fields["llama.rope.scaling.factor"] = rope["factor"]
            if rope is yarn:
                fields["llama.rope.scaling.original_context_length"] = 16
        write(tmp_path / "m.gguf", fields, tensors)
        spec, params = purelm.load(tmp_path / "m.gguf", device="cpu")
        with torch.no_grad():
            want = model(bridged.ids(length=50)).logits
            bridged.same_logits(decoder.forward(params, spec, bridged.ids(length=50)), want)
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 32, dtype=np.float32)
    write(tmp_path / "m.gguf", fields_of(model.config), tensors)
    with pytest.raises(ConfigError, match="divisors"):
        purelm.load(tmp_path / "m.gguf", device="cpu")
    # More than a head can have are refused before they are read.
    tensors["rope_freqs.weight"] = np.ones(1 << 13, dtype=np.float32)
    write(tmp_path / "m.gguf", fields_of(model.config), tensors)
    with pytest.raises(CheckpointError, match=r"found shape \[8192\], expected a divisor"):
        purelm.load(tmp_path / "m.gguf", device="cpu")


def test_a_trained_model_and_its_tokenizer() -> None:
    folder = assets.shared("assets/stories260K")
    spec, params = purelm.load(folder, device="cpu")
    want = decoder.forward(params, spec, bridged.ids())
    for kind in ("f32", "q8_0"):
        file = folder / f"stories260K-{kind}.gguf"
        found, leaves = purelm.load(file, device="cpu")
        assert found == spec
        logits = decoder.forward(leaves, found, bridged.ids())
        if kind == "f32":
            assert torch.equal(logits, want)
        else:
            assert 0 < float((logits - want).abs().max() / want.abs().max()) < 2**-5
        same_tokenizer(read_tokenizer(open_gguf(file)), Tokenizer.from_folder(folder))
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        file, load_in_4bit=False, dtype=torch.float32, device_map="cpu", max_seq_length=None
    )
    ids = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named")


def same_tokenizer(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in TEXTS:
        for special in (True, False):
            one, two = (t(text, add_special_tokens=special)["input_ids"] for t in (ours, theirs))
            assert one == two, text
            assert ours.decode(one) == theirs.decode(two)
    assert ours.bos_token == theirs.bos_token and ours.eos_token == theirs.eos_token
    assert len(ours) == len(theirs)


def byte_level_fields(folder: Path, pre: str) -> Fields:
    """What a GGUF file would hold of the byte-level tokenizer in `folder`."""
    held = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token for token in held["added_tokens"]}
    vocab = {**held["model"]["vocab"], **{t: a["id"] for t, a in added.items()}}
    tokens = sorted(vocab, key=lambda token: int(vocab[token]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in held["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            1 if t not in added else 3 if added[t]["special"] else 4 for t in tokens
        ],
        "tokenizer.ggml.merges": merges,
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    """A whole model of 420 tokens in one GGUF file, tokenizer included."""
    root: Path = tmp_path_factory.mktemp("gguf")
    tiny_tokenizers.byte_level(root / "tokenizer")
    model = tiny.hf_model("llama", vocab_size=420, **SMALL)
    fields = {
        **fields_of(model.config),
        **byte_level_fields(root / "tokenizer", "gpt-2"),
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    write(root / "m.gguf", fields, tensors_of(model))
    return root / "m.gguf"


def test_byte_level_tokenizers(small: Path, tmp_path: Path) -> None:
    ours, theirs = (
        read_tokenizer(open_gguf(small)),
        Tokenizer.from_folder(small.parent / "tokenizer"),
    )
    for text in TEXTS:
        one, two = (t(text, add_special_tokens=False)["input_ids"] for t in (ours, theirs))
        assert one == two and ours.decode(one) == theirs.decode(two)
    assert ours.chat_template == "{{ messages[0]['content'] }}"
    assert ours.eos_token_id == 3
    ours.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert [again(t)["input_ids"] for t in TEXTS] == [ours(t)["input_ids"] for t in TEXTS]


PUBLISHED = {
    "llama3": "llama-bpe",
    "qwen3": "qwen2",
    "gptoss": "gpt-4o",
    "deepseek_v3": "deepseek-v3",
}


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("smollm2", "smollm"),
        ("minimind", "gpt-2"),
        *(pytest.param(*pair, marks=pytest.mark.full) for pair in PUBLISHED.items()),
    ],
)
def test_published_byte_level_tokenizers(name: str, pre: str, tmp_path: Path) -> None:
    folder = (
        assets.published(name) if name in PUBLISHED else assets.shared(f"assets/tokenizers/{name}")
    )
    fields = {"general.architecture": "llama", **byte_level_fields(folder, pre)}
    write(tmp_path / "t.gguf", fields, {})
    ours, theirs = read_tokenizer(open_gguf(tmp_path / "t.gguf")), Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]


def test_from_pretrained_trains_and_saves(small: Path, tmp_path: Path) -> None:
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        small, device_map="cpu", max_seq_length=None, dtype=torch.float32
    )
    assert tokenizer.eos_token_id == 3 and model.config.model_type == "llama"
    model = purelm.FastLanguageModel.get_peft_model(model, r=4)
    model(bridged.ids(), labels=bridged.ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = purelm.FastLanguageModel.from_pretrained(
        tmp_path / "adapter", device_map="cpu", max_seq_length=None, dtype=torch.float32
    )
    want = model.eval()(bridged.ids()).logits.detach()
    bridged.same_logits(again(bridged.ids()).logits.detach(), want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_merged_onto_the_dequantized_base(
    kind: str, quantize: Any, small: Path, tmp_path: Path
) -> None:
    """transformers runs what was merged, with the logits of the dequantized weights."""
    held = open_gguf(small)
    tensors = tensors_of(tiny.hf_model("llama", vocab_size=420, **SMALL))
    write(tmp_path / "m.gguf", dict(held.fields), tensors, kind)
    model, _ = purelm.FastLanguageModel.from_pretrained(
        tmp_path / "m.gguf",
        device_map="cpu",
        max_seq_length=None,
        dtype=torch.float32,
        load_in_4bit=quantize == "nf4",
        fix_tokenizer=False,
    )
    model = purelm.FastLanguageModel.get_peft_model(model, r=4).eval()
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged")
    spec, dense = purelm.load(tmp_path / "m.gguf", device="cpu")
    want = decoder.forward(lora.merge(dense, model.adapters), spec, bridged.ids()).detach()
    hf: Any = transformers
    made = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    bridged.same_logits(made.eval()(bridged.ids()).logits.detach(), want)
    assert made.config.architectures == ["LlamaForCausalLM"]
    assert Tokenizer.from_folder(tmp_path / "merged")("a b")["input_ids"]
    if quantize:
        model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
        four_spec, four = purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
        assert four_spec == spec and isinstance(four["layers"][0]["mlp"]["up"]["weight"], NF4)


def test_merged_in_the_dtype_that_was_trained_in(small: Path, tmp_path: Path) -> None:
    """One dtype for all tensors, which transformers needs beside 4-bit weights."""
    held = open_gguf(small)
    tensors = {name: read_tensor(info).numpy() for name, info in held.tensors.items()}
    write(tmp_path / "m.gguf", dict(held.fields), tensors, "Q8_0")
    model, _ = purelm.FastLanguageModel.from_pretrained(
        tmp_path / "m.gguf", device_map="cpu", max_seq_length=None, fix_tokenizer=False
    )
    hf: Any = transformers
    for method in ("merged_16bit", "merged_4bit"):
        model.save_pretrained_merged(tmp_path / method, save_method=method)
        made = hf.AutoModelForCausalLM.from_pretrained(tmp_path / method, device_map="cpu")
        assert made.dtype == torch.bfloat16
        assert bool(made(bridged.ids()).logits.isfinite().all())


def test_the_header_is_read_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counted(path: Path) -> gguf_file.GGUF:
        opened.append(path)
        return open_gguf(path)

    monkeypatch.setattr(gguf_file, "open_gguf", counted)
    purelm.FastLanguageModel.from_pretrained(small, device_map="cpu", max_seq_length=None)
    assert opened == [small]


def test_without_the_library(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArgumentError, match=r"pip install 'purelm\[gguf\]'"):
        purelm.load(small, device="cpu")


def test_which_file(small: Path, tmp_path: Path) -> None:
    shutil.copy(small, tmp_path / "a.gguf")
    assert find(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        purelm.load(tmp_path, device="cpu")
    purelm.load(tmp_path / "a.gguf", device="cpu")
    with pytest.raises(ArgumentError, match="revision"):
        purelm.load(tmp_path / "a.gguf", device="cpu", revision="main")
    with pytest.raises(SourceError):
        purelm.load(tmp_path / "absent.gguf", device="cpu")


# Files that are broken, or made to do harm.


def header(*, tensors: int = 0, fields: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


def array(kind: int, count: int) -> bytes:
    return text(b"x") + struct.pack("<IIQ", 9, kind, count)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "magic": (b"GGML" + bytes(60), "expected a GGUF file"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "endless fields": (header(fields=2**63), "announces"),
    "endless tensors": (header(tensors=2**63), "announces"),
    "fields missing": (header(fields=9), "cut short"),
    "a long text": (header(fields=1, rest=text(b"a", 2**62)), "cut short"),
    "an endless array": (header(fields=1, rest=array(0, 2**62)), "malformed"),
    "endless texts": (header(fields=1, rest=array(8, 2**62)), "malformed"),
    "an array of arrays": (header(fields=1, rest=array(9, 1)), "malformed"),
    "an array cut": (header(fields=1, rest=array(4, 9)), "cut short"),
    "an unknown type": (header(fields=1, rest=text(b"x") + struct.pack("<I", 99)), "type 99"),
    "no boolean": (header(fields=1, rest=text(b"x") + struct.pack("<IB", 7, 2)), "neither"),
    "not utf-8": (header(fields=1, rest=text(b"\xff\xfe")), "UTF-8"),
    "a field twice": (
        header(fields=2, rest=(text(b"x") + struct.pack("<IB", 7, 1)) * 2),
        "occurs twice",
    ),
    "alignment": (
        header(fields=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
        "power of two",
    ),
    "five dimensions": (header(tensors=1, rest=tensor(b"t", [1] * 5, 0, 0)), "5 dimensions"),
    "no dimension": (header(tensors=1, rest=tensor(b"t", [], 0, 0)), "0 dimensions"),
    "an empty tensor": (header(tensors=1, rest=tensor(b"t", [0], 0, 0)), "dimensions"),
    "a huge tensor": (header(tensors=1, rest=tensor(b"t", [2**39] * 4, 0, 0)), "cut short"),
    "half a block": (header(tensors=1, rest=tensor(b"t", [33], 8, 0)), "blocks of 32"),
    "between": (header(tensors=1, rest=tensor(b"t", [4], 0, 7) + bytes(99)), "dimensions"),
    "unknown kind": (header(tensors=1, rest=tensor(b"t", [256], 16, 0)), "ggml type 16"),
    "twice": (header(tensors=2, rest=tensor(b"t", [4], 0, 0) * 2), "occurs twice"),
    "overlap": (
        header(tensors=2, rest=tensor(b"t", [9], 0, 0) + tensor(b"u", [9], 0, 32) + bytes(99)),
        "overlaps",
    ),
    "outside": (header(tensors=1, rest=tensor(b"t", [4], 0, 2**40)), "cut short"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(what: str, tmp_path: Path) -> None:
    content, message = HOSTILE[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as problem:
        purelm.load(path, device="cpu")
    assert "bad.gguf" in str(problem.value)


def test_every_cut_is_noticed(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(0, 600, 37), *range(600, len(content), len(content) // 40)]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_gguf(path)


def test_flipped_bytes_give_typed_errors_or_a_model(small: Path, tmp_path: Path) -> None:
    """Nothing but purelm's errors, whatever the header says."""
    content, path = small.read_bytes(), tmp_path / "flip.gguf"
    generator, refused = np.random.default_rng(0), 0
    for _ in range(60):
        changed = bytearray(content)
        changed[int(generator.integers(0, 16000))] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read_tokenizer(open_gguf(path))
                purelm.load(path, device="cpu")
            except PurelmError:
                refused += 1
    assert refused > 5


def changed(**changes: Any) -> Callable[[Fields], Fields]:
    def change(fields: Fields) -> Fields:
        made = {**fields, **{name.replace("__", "."): value for name, value in changes.items()}}
        return {name: value for name, value in made.items() if value is not None}

    return change


MODELS: dict[str, tuple[dict[str, Any], type[PurelmError], str]] = {
    "a piece": ({"split__count": 2}, CheckpointError, "one of 2 pieces.*gguf-split --merge"),
    "architecture": ({"general__architecture": "mamba"}, ConfigError, "mamba"),
    "no heads": ({"llama__attention__head_count": None}, ConfigError, "head_count"),
    "heads as text": ({"llama__attention__head_count": "4"}, ConfigError, "head_count"),
    "heads per layer": ({"llama__attention__head_count": [4, 4]}, ConfigError, "head_count"),
    "no depth": ({"llama__block_count": 0}, ConfigError, "block_count"),
    "other depth": ({"llama__block_count": 3}, CheckpointError, "missing"),
    "experts": (
        {"llama__expert_count": 8, "llama__expert_used_count": 2},
        CheckpointError,
        "block_sparse_moe",
    ),
    "no number of experts": ({"llama__expert_count": [8]}, ConfigError, "expert_count is"),
    "shared experts": ({"llama__expert_shared_count": 1}, ConfigError, "expert_shared_count=1"),
    "window": ({"llama__attention__sliding_window": 9}, ConfigError, "sliding_window=9"),
    "partial rope": ({"llama__rope__dimension_count": 8}, ConfigError, "dimension_count"),
    "scaling": ({"llama__rope__scaling__type": "spiral"}, ConfigError, "spiral"),
    "longrope": ({"llama__rope__scaling__type": "longrope"}, CheckpointError, "rope_factors_long"),
    "eps": ({"llama__attention__layer_norm_rms_epsilon": -1.0}, ConfigError, "epsilon"),
    "key heads": ({"llama__attention__head_count_kv": 3}, ConfigError, "no multiple"),
    "other sizes": ({"llama__feed_forward_length": 32}, CheckpointError, "ffn|gate_proj|down"),
    "no tokens": ({"tokenizer__ggml__tokens": None}, TokenizerError, "tokens"),
    "a token twice": ({"tokenizer__ggml__tokens": ["a"] * 402}, TokenizerError, "twice"),
    "few types": ({"tokenizer__ggml__token_type": [1, 2]}, TokenizerError, "2 entries"),
    "kind": ({"tokenizer__ggml__model": "t5"}, TokenizerError, "'t5'"),
    "pre": ({"tokenizer__ggml__pre": "chameleon"}, TokenizerError, "'chameleon'"),
    "no merges": ({"tokenizer__ggml__merges": None}, TokenizerError, "merges"),
    "bad merge": ({"tokenizer__ggml__merges": ["a b c"]}, TokenizerError, "two tokens"),
    "merge of nothing": ({"tokenizer__ggml__merges": ["zzz yyy"]}, TokenizerError, "made"),
    "eos": ({"tokenizer__ggml__eos_token_id": 9999}, TokenizerError, "9999"),
    "no scores": ({"tokenizer__ggml__model": "llama"}, TokenizerError, "scores"),
    "nan scores": (
        {"tokenizer__ggml__model": "llama", "tokenizer__ggml__scores": [float("nan")] * 300},
        TokenizerError,
        "scores",
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_metadata_that_does_not_fit(what: str, small: Path, tmp_path: Path) -> None:
    changes, error, message = MODELS[what]
    held = open_gguf(small)
    fields = changed(**changes)(dict(held.fields))
    tensors = {name: (read_tensor(info).numpy()) for name, info in held.tensors.items()}
    path = tmp_path / "m.gguf"
    write(path, fields, tensors)
    with pytest.raises(error, match=message) as problem:
        purelm.FastLanguageModel.from_pretrained(path, device_map="cpu", max_seq_length=None)
    assert str(tmp_path) in str(problem.value)


def test_weights_that_are_not_finite(small: Path, tmp_path: Path) -> None:
    held = open_gguf(small)
    tensors = {name: read_tensor(info).numpy() for name, info in held.tensors.items()}
    tensors["blk.1.ffn_up.weight"][3, 4] = np.inf
    for kind in ("F32", "Q8_0"):
        write(tmp_path / "m.gguf", dict(held.fields), tensors, kind)
        with pytest.raises(CheckpointError, match="NaN or infinite.*layers.1.mlp.up_proj"):
            purelm.load(tmp_path / "m.gguf", device="cpu")
    extra = {**tensors, "blk.1.ffn_gate_inp.weight": np.ones((2, 4), np.float32)}
    write(tmp_path / "m.gguf", dict(held.fields), extra)
    with pytest.raises(CheckpointError, match="ffn_gate_inp"):
        purelm.load(tmp_path / "m.gguf", device="cpu")
