"""GGUF files that are written: read by the gguf library and by our reader as what was meant."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import assets
import bridged
import gguf
import gguf_models
import numpy as np
import pytest
import tiny_tokenizers
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import purelm
from purelm.convert.gguf_file import open_gguf
from purelm.convert.gguf_tokenizer import read_tokenizer
from purelm.convert.gguf_tokenizer_write import check_tokenizer, tokenizer_fields
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import ArgumentError, ConfigError, SaveError, TokenizerError
from purelm.nn import decoder, tree
from purelm.quant.nf4 import NF4

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# A name of the case: the family, what its config has, whether all of it is trained in LoRA.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 24}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "window": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "yarn": (
        "qwen3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """What the gguf library's own reader finds, under ggml's names."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = values.reshape(tuple(reversed(tensor.shape.tolist())))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_has_its_logits(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    model = gguf_models.model_of(tmp_path, family, **fields)
    want = model(bridged.ids()).logits.detach()
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    assert path.name == "source.F32.gguf" and [p.name for p in path.parent.iterdir()] == [path.name]
    spec, params = purelm.load(path, device="cpu", dtype=torch.float32)
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)
    assert spec.max_positions == (32 if case == "window" else model.spec.max_positions)
    assert spec.tied == model.spec.tied


@pytest.mark.parametrize("method", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_quantized_weights_are_those_of_the_gguf_library(method: str, tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, "qwen2")
    (plain,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    (path,) = model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), method.upper())
    dense, found = dequantized(plain), dequantized(path)
    assert dense.keys() == found.keys()
    for name, values in dense.items():
        outer = name in ("token_embd.weight", "output.weight") and method.startswith(("q4", "q5"))
        kind = gguf.GGMLQuantizationType["Q8_0" if outer else method.upper()]
        if values.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        want = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        assert np.array_equal(found[name], want), name
    assert open_gguf(path).fields["general.file_type"] == getattr(
        gguf.LlamaFileType, f"MOSTLY_{method.upper()}"
    )


def test_four_bit_model_into_its_original_several_files_at_once(tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, "llama", adapt=False)
    four = bridged.bridge(tmp_path / "source", quantize="nf4")
    assert any(isinstance(leaf, NF4) for leaf in tree.leaves(four.params))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    paths = four.save_pretrained_gguf(
        tmp_path / "out", gguf_models.tokenizer(), ["q8_0", "f32", "Q8_0", "fast_quantized"]
    )
    assert [path.name for path in paths] == ["source.Q8_0.gguf", "source.F32.gguf"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    spec, params = purelm.load(paths[1], device="cpu", dtype=torch.float32)
    want = model(bridged.ids()).logits.detach()
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)


def test_from_pretrained_reads_what_was_written(tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, "llama")
    tokenizer = gguf_models.tokenizer()
    (path,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer.to_transformers())
    again, found = purelm.FastLanguageModel.from_pretrained(
        path, device_map="cpu", max_seq_length=None, load_in_4bit=False, dtype=torch.float32
    )
    assert found.chat_template == tokenizer.chat_template
    assert (found.eos_token_id, found.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    reader = gguf.GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(kinds) == 1600 and tokens[1599] == "[PAD1599]" and kinds[1599] == 5
    assert [tokens[i] for i in range(1536)] == tokenizer.convert_ids_to_tokens(list(range(1536)))
    prompt = torch.tensor([tokenizer("The quick brown fox")["input_ids"]])
    again.generate(prompt, max_new_tokens=4, do_sample=False)
    # Nothing of the base's own files may be replaced by what they are merged into.
    with pytest.raises(SaveError, match="loaded from"):
        model.save_pretrained_gguf(tmp_path / "source", tokenizer)


def written(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer after a round through a file."""
    path = folder / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in tokenizer_fields(tokenizer, len(tokenizer) + 3).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    check_tokenizer(open_gguf(path), tokenizer)
    return read_tokenizer(open_gguf(path))


def retold(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    """`tokenizer` with its tokenizer.json changed."""
    made = json.loads(tokenizer.to_json())
    change(made)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)), tokenizer.init_kwargs)


def sentencepiece(folder: Path) -> Tokenizer:
    """Llama's kind, its merges made complete as SentencePiece's are: every pair of tokens that is
    a token, in the order of the result."""
    found = Tokenizer.from_folder(tiny_tokenizers.sentencepiece(folder))

    def complete(made: dict[str, Any]) -> None:
        model = made["model"]
        rank: dict[str, int] = {}
        for left, right in model["merges"]:
            rank.setdefault(left + right, len(rank))
        vocab = {t: i for t, i in model["vocab"].items() if not t.startswith("<")}
        pairs = [
            (rank[token], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
            for token in rank
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        model["merges"] = [[left, right] for *_, left, right in sorted(pairs)]

    return retold(found, complete)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: Any) -> list[tuple[Tokenizer, Tokenizer]]:
    """Tokenizers of both kinds and what comes back of them."""
    root = tmp_path_factory.mktemp("rounds")
    made = [gguf_models.tokenizer(), sentencepiece(root / "spm")]
    result = []
    for index, tokenizer in enumerate(made):
        (root / str(index)).mkdir()
        result.append((tokenizer, written(root / str(index), tokenizer)))
    return result


@given(text=st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_same_ids(rounds: list[tuple[Tokenizer, Tokenizer]], text: str) -> None:
    for ours, found in rounds:
        want = ours(text)["input_ids"]
        assert found(text)["input_ids"] == want
        assert found.decode(want) == ours.decode(want)


@pytest.mark.parametrize("name", ["smollm2", "minimind"])
def test_published_tokenizers(name: str, tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(assets.shared(f"assets/tokenizers/{name}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        written(tmp_path, ours)


def test_a_trained_model_tells_the_same_story(tmp_path: Path) -> None:
    folder = assets.shared("assets/stories260K")
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        folder, device_map="cpu", max_seq_length=None, load_in_4bit=False, dtype=torch.float32
    )
    (path,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32")
    again, found = purelm.FastLanguageModel.from_pretrained(
        path, device_map="cpu", max_seq_length=None, load_in_4bit=False, dtype=torch.float32
    )
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert torch.equal(found("Once upon a time", return_tensors="pt")["input_ids"], prompt)
    one, two = (m.generate(prompt, max_new_tokens=30, do_sample=False) for m in (model, again))
    assert torch.equal(one, two)


@pytest.mark.full
def test_llama_cpp_tells_the_same_story(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = assets.shared("assets/stories260K")
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        folder, device_map="cpu", max_seq_length=None, load_in_4bit=False, dtype=torch.float32
    )
    (path,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32")
    theirs = llama_cpp.Llama(model_path=str(path), n_ctx=128, verbose=False)
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert theirs.tokenize(b"Once upon a time", special=True) == prompt[0].tolist()
    made = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    text = theirs("Once upon a time", max_tokens=40, temperature=0.0)["choices"][0]["text"]
    assert text == tokenizer.decode(made, skip_special_tokens=True)


def test_what_is_not_offered(tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, "llama", intermediate_size=80)
    tokenizer = gguf_models.tokenizer()
    for method in ("q4_k_m", "q6_k", "iq4_xs", [], ["q8_0", "nf4"], 4):
        with pytest.raises(ArgumentError, match="expected of f32, f16, bf16, q8_0"):
            model.save_pretrained_gguf(tmp_path / "out", tokenizer, method)
    with pytest.raises(ArgumentError, match="give one"):
        model.save_pretrained_gguf(tmp_path / "out")
    with pytest.raises(ArgumentError, match="down_proj.weight is 80 wide, and Q8_0 stores blocks"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    with pytest.raises(ArgumentError, match="save_pretrained_gguf"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer, save_method="gguf")
    assert not (tmp_path / "out").exists()


NEXT = gguf_models.FAMILIES["qwen3_next"]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("falcon", {"hidden_size": 64}, "family 'falcon' are not written"),
        ("gemma2", {"head_dim": 16}, "attention.scale would be 0.25 and is 0.0625"),
        ("qwen3_moe", {"norm_topk_prob": False}, "normalise would be True and is False"),
        ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}, "rope"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope scaling 'dynamic'",
        ),
        ("llama", {"hidden_act": "gelu"}, "cannot express this model"),
        (
            "falcon_h1",
            {"tie_word_embeddings": True, "lm_head_multiplier": 0.5},
            "logits with 0.5, and both have one matrix",
        ),
        ("falcon_h1", {"mamba_proj_bias": True}, "in_bias would be False and is True"),
        ("qwen3_next", {"layer_types": None}, "no layer has attention"),
        ("qwen3_next", {**NEXT, "rms_norm_eps": 1e-5}, "norm.eps would be 1e-06 and is 1e-05"),
        ("qwen3_next", {**NEXT, "linear_value_head_dim": 32}, "value_dim would be 16 and is 32"),
        ("deepseek_v3", {"rope_interleave": False}, "interleaved would be True and is False"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "limit would be 7.0 and is 5.0"),
    ],
)
def test_models_that_the_format_cannot_express(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = gguf_models.model_of(tmp_path, family, **fields)
    with pytest.raises(ConfigError, match=message):
        model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "f32")
    assert not (tmp_path / "out").exists()


def test_values_that_a_type_cannot_hold(tmp_path: Path) -> None:
    model = gguf_models.model_of(tmp_path, "llama")
    first = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        first *= 1e9
    for method in ("f16", "q8_0"):
        with pytest.raises(SaveError, match="beyond 65504"):
            model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), method)
    model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "bf16")
    with torch.no_grad():
        first.fill_(float("nan"))
    with pytest.raises(SaveError, match="not finite"):
        model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), "bf16")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["source.BF16.gguf"]


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_models.model_of(tmp_path, "llama")

    class Usage:
        free = 100_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(SaveError, match="bytes, 100,000 are free"):
        model.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer())


def other_digits(made: dict[str, Any]) -> None:
    split = {"type": "Digits", "individual_digits": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, made["pre_tokenizer"]]}


def greedy_space(made: dict[str, Any]) -> None:
    made["added_tokens"][3]["lstrip"] = True


def lower(made: dict[str, Any]) -> None:
    made["normalizer"] = {"type": "Lowercase"}


def twice(made: dict[str, Any]) -> None:
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|pad|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [3], "tokens": ["<|pad|>"]}},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_digits, "splits text has no name"),
        (greedy_space, "takes the spaces beside it"),
        (lower, "splits text has no name"),
        (twice, "neither bos nor eos"),
    ],
)
def test_byte_level_tokenizers_that_the_format_cannot_express(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_fields(retold(gguf_models.tokenizer(), change), 1600)


def test_other_tokenizers_that_the_format_cannot_express(tmp_path: Path) -> None:
    found = sentencepiece(tmp_path)

    def fewer(made: dict[str, Any]) -> None:
        del made["model"]["merges"][-1]

    def lowered(made: dict[str, Any]) -> None:
        made["normalizer"]["normalizers"].append({"type": "Lowercase"})

    for change, message in ((fewer, "do not follow from scores"), (lowered, "Lowercase")):
        with pytest.raises(TokenizerError, match=message):
            tokenizer_fields(retold(found, change), 600)
    with pytest.raises(TokenizerError, match="the model 100 embeddings"):
        tokenizer_fields(found, 100)
    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(TokenizerError, match="kind 'WordLevel'"):
        tokenizer_fields(words, 100)
