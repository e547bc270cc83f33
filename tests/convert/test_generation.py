"""`generate` in Hugging Face's words: against transformers' own `generate` on the same folder."""

import json
import threading
from pathlib import Path
from typing import Any, cast

import assets
import pytest
import tiny
import tiny_tokenizers
import tokenizers
import torch
import transformers
from bridged import left_padded

import purelm
from purelm import FastLanguageModel
from purelm.convert.bridge import CausalLM, Origin
from purelm.convert.config import Config
from purelm.convert.end_ids import end_of_turn
from purelm.convert.generation import generate
from purelm.convert.load import load_folder
from purelm.convert.stop_strings import stop_strings
from purelm.convert.streamer import TextStreamer
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import ArgumentError, InputError
from purelm.nn.lora import LoRA

PAD = 0


def bridge(folder: Path, tokenizer: Tokenizer | None = None) -> CausalLM:
    loaded = load_folder(folder, quantize=None, dtype=None, device=torch.device("cpu"))
    own = folder / "generation_config.json"
    model = CausalLM(
        loaded.spec,
        loaded.params,
        config=loaded.config,
        generation_config=Config.from_folder(folder, own.name) if own.exists() else Config({}),
        origin=Origin("tiny", None, folder, loaded.family, loaded.checkpoint, None),
        dtype=torch.float32,
        max_seq_length=64,
    )
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    """(transformers' model, ours) of one folder."""
    theirs = tiny.hf_model("llama", eos_token_id=2, bos_token_id=1, pad_token_id=None)
    folder = tiny.save(theirs, tmp_path_factory.mktemp("generation") / "model")
    return theirs, bridge(folder)


@pytest.fixture
def ours(pair: tuple[Any, CausalLM]) -> CausalLM:
    return pair[1]


WORDS = ["the", "Ġstop", "st", "op", "pers", "Ġa", "b", "Ċ", "!", "Ã", "©", "caf", "Ġlas", "topper"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer of 99 ids whose tokens cut words and characters in pieces."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<turn>": 3}
    vocab |= {word: 4 + i for i, word in enumerate(WORDS)}
    letters = [c for c in sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) if c not in vocab]
    vocab |= {c: len(vocab) + i for i, c in enumerate(letters[: 99 - len(vocab)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], fuse_unk=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<turn>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def prompts(seed: int = 0, lengths: tuple[int, ...] = (3, 9, 6)) -> dict[str, Any]:
    return left_padded(lengths, seed, PAD)


KEYWORDS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {"max_length": 25},
    {"max_new_tokens": 30, "repetition_penalty": 1.3},
    {"max_new_tokens": 30, "eos_token_id": [5, 17, 60, 61, 62, 63, 64, 65], "pad_token_id": 7},
    {"max_new_tokens": 30, "eos_token_id": list(range(40, 99))},
    {"max_new_tokens": 30, "eos_token_id": list(range(40, 99)), "min_new_tokens": 6},
    {"max_new_tokens": 30, "eos_token_id": list(range(40, 99)), "min_length": 14},
    {"max_new_tokens": 12, "do_sample": True, "top_k": 1},
    {"max_new_tokens": 5, "use_cache": False, "num_beams": 1, "return_dict_in_generate": False},
    {"max_new_tokens": 30, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 12, "sequence_bias": {(40,): 8.0, (40, 41): 9.0, (41, 40): -9.0}},
    {"max_new_tokens": 30, "bad_words_ids": [[i] for i in range(4, 50)] + [[60, 61]]},
    {"max_new_tokens": 30, "suppress_tokens": list(range(4, 60)), "repetition_penalty": 1.2},
    {"generation_config": transformers.GenerationConfig(max_new_tokens=9, eos_token_id=[50, 51])},
]


@pytest.mark.parametrize("keywords", KEYWORDS, ids=[",".join(k) for k in KEYWORDS])
def test_equals_transformers(pair: tuple[Any, CausalLM], keywords: dict[str, Any]) -> None:
    theirs, ours = pair
    assert torch.equal(
        generate(ours, **prompts(), **keywords), theirs.generate(**prompts(), **keywords)
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_scores_and_logits_are_transformers(pair: tuple[Any, CausalLM], sampled: bool) -> None:
    theirs, ours = pair
    asked: dict[str, Any] = {"max_new_tokens": 8, "repetition_penalty": 1.4, "eos_token_id": []}
    asked |= {"do_sample": True, "top_k": 1} if sampled else {}
    asked |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = generate(ours, **prompts(), **asked)
    wanted = theirs.generate(**prompts(), **{**asked, "eos_token_id": None})
    assert torch.equal(out["sequences"], wanted.sequences)
    for mine, other in ((out.scores, wanted.scores), (out.logits, wanted.logits)):
        assert len(mine) == len(other) == 8
        for x, y in zip(mine, other, strict=True):
            torch.testing.assert_close(x, y)
    plain = generate(ours, **prompts(), max_new_tokens=4, return_dict_in_generate=True)
    assert plain.scores is None and plain.logits is None
    with pytest.raises(ArgumentError, match="return_dict_in_generate"):
        generate(ours, **prompts(), max_new_tokens=4, output_scores=True)


def test_no_limit_is_20_tokens_and_a_warning(pair: tuple[Any, CausalLM]) -> None:
    theirs, ours = pair
    with pytest.warns(UserWarning, match="20 tokens") as told:
        out = ours.generate(**prompts(), eos_token_id=[])
    assert told[0].filename == __file__  # it names the caller's line
    with pytest.warns(UserWarning, match="max_length"):
        assert torch.equal(out, theirs.generate(**prompts(), eos_token_id=None))
    assert out.shape[1] == 29


def test_generation_config_json_is_obeyed(tmp_path: Path) -> None:
    """Every field that works, stored in the file, does what transformers does with it."""
    model = tiny.hf_model("qwen3", eos_token_id=2, pad_token_id=PAD)
    model.generation_config.update(
        max_new_tokens=11, repetition_penalty=1.2, eos_token_id=[2, 50, 51, 52, 53], top_k=1
    )
    model.generation_config.do_sample = True
    folder = tiny.save(model, tmp_path / "model")
    out = generate(bridge(folder), **prompts())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(out, theirs.generate(**prompts()))
    greedy = generate(bridge(folder), **prompts(), do_sample=False, max_new_tokens=4)
    assert greedy.shape[1] <= 9 + 4


def test_the_file_limits_end_at_the_context_and_the_calls_raise(tmp_path: Path) -> None:
    model = tiny.hf_model("llama", eos_token_id=None)
    model.generation_config.max_new_tokens = 4096
    ours = bridge(tiny.save(model, tmp_path / "model"))
    assert generate(ours, **prompts(), eos_token_id=[]).shape[1] == 64
    with pytest.raises(InputError, match="4096"):
        generate(ours, **prompts(), max_new_tokens=4096)
    with pytest.raises(InputError, match="max_length is 9"):
        generate(ours, **prompts(), max_length=9)


def test_the_calls_limit_beats_the_files(tmp_path: Path) -> None:
    model = tiny.hf_model("llama", eos_token_id=None)
    model.generation_config.max_new_tokens = 30
    ours = bridge(tiny.save(model, tmp_path / "model"))
    assert generate(ours, **prompts(), max_length=12).shape[1] == 12
    assert generate(ours, **prompts(), generation_config={"max_length": 13}).shape[1] == 13


def test_pads_without_a_mask_are_padding(pair: tuple[Any, CausalLM]) -> None:
    theirs, ours = pair
    ids = prompts()["input_ids"]
    keywords: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": PAD}
    out = generate(ours, ids, **keywords)
    assert torch.equal(out, theirs.generate(ids, **keywords))
    assert torch.equal(out, generate(ours, **prompts(), **keywords))


def test_right_padding_equals_each_row_alone(ours: CausalLM) -> None:
    batch = prompts()
    rolls = [n - 9 for n in (3, 9, 6)]
    right: dict[str, Any] = {
        key: torch.stack([row.roll(by) for row, by in zip(rows, rolls, strict=True)])
        for key, rows in batch.items()
    }
    out = generate(ours, **right, max_new_tokens=8, eos_token_id=[])
    for row, n in zip(range(3), (3, 9, 6), strict=True):
        alone = generate(
            ours, right["input_ids"][row : row + 1, :n], max_new_tokens=8, eos_token_id=[]
        )
        assert torch.equal(out[row, 9:], alone[0, n:])


def test_no_prompt_begins_with_bos(pair: tuple[Any, CausalLM]) -> None:
    theirs, ours = pair
    assert torch.equal(generate(ours, max_new_tokens=5), theirs.generate(max_new_tokens=5))
    ours.config.bos_token_id, kept = None, ours.config.bos_token_id
    own, ours.generation_config = ours.generation_config, Config({})
    try:
        with pytest.raises(ArgumentError, match="no prompt"):
            generate(ours)
    finally:
        ours.config.bos_token_id, ours.generation_config = kept, own


def test_eos_is_what_all_files_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """generation_config.json, config.json, the tokenizer and its template each name another."""
    model = tiny.hf_model("llama", eos_token_id=40)
    model.generation_config.eos_token_id = [41, 42]
    folder = tiny.save(model, tmp_path / "model")
    ours = bridge(folder, tokenizer)
    templated = Tokenizer.from_folder(tokenizer.name_or_path)
    templated.chat_template = "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}"
    assert end_of_turn(templated) == 3 and end_of_turn(tokenizer) is None
    ids = torch.tensor([[5, 6]])
    only: dict[str, Any] = {"max_new_tokens": 1}

    def forced(to: int) -> Any:
        return [lambda ids, scores: scores.index_fill(-1, torch.tensor([to]), 1e9)]

    for index, ends in ((40, True), (41, True), (42, True), (2, True), (3, False), (43, False)):
        out = generate(ours, ids, max_new_tokens=3, logits_processor=forced(index))
        assert (out.shape[1] == 3) == ends, index
    ours.tokenizer = templated
    assert generate(ours, ids, max_new_tokens=3, logits_processor=forced(3)).shape[1] == 3
    # What the call asks for is not added to.
    asked = generate(ours, ids, max_new_tokens=3, logits_processor=forced(3), eos_token_id=40)
    assert asked.shape[1] == 5
    assert generate(ours, ids, **only).shape[1] == 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}the{% endfor %}",
        "nothing",
    ],
)
def test_templates_that_end_a_turn_with_no_special_token(
    template: str, tokenizer: Tokenizer
) -> None:
    other = Tokenizer.from_folder(tokenizer.name_or_path)
    other.chat_template = template
    assert end_of_turn(other) is None


@pytest.mark.parametrize(
    ("pieces", "stops"),
    [
        (["st", "op"], True),
        (["Ġstop"], True),
        (["st", "op", "pers"], False),
        (["Ġlas", "topper"], True),
        (["st", "op", "Ġa", "st"], False),
        (["st"], False),
        (["Ã"], False),
        (["caf", "Ã", "©"], True),
        (["Ċ", "Ċ"], True),
        (["Ċ", "b", "Ċ"], False),
    ],
)
def test_stop_strings_match_as_in_transformers(
    pieces: list[str], stops: bool, tokenizer: Tokenizer
) -> None:
    strings = ["stop", "é", "\n\n"]
    ids = torch.tensor([[tokenizer.get_vocab()[p] for p in ["the", *pieces]]])
    theirs = transformers.StopStringCriteria(tokenizer.to_transformers(), strings)
    assert bool(theirs(ids, None)) == stops
    assert stop_strings(strings, tokenizer)(ids).tolist() == [stops]


def test_stop_strings_end_each_row_and_pad(
    pair: tuple[Any, CausalLM], tokenizer: Tokenizer
) -> None:
    """The same ids as transformers where all rows run on, then each row to its own stop."""
    theirs, ours = pair
    free = generate(ours, **prompts(), max_new_tokens=30, eos_token_id=[])
    strings = [tokenizer.decode(free[i, 9 + n : 11 + n]) for i, n in enumerate((3, 12, 20))]
    strings = [text for text in strings if "\ufffd" not in text and text]
    assert strings
    keywords: dict[str, Any] = {"max_new_tokens": 30, "stop_strings": strings, "pad_token_id": PAD}
    out = generate(ours, **prompts(), **keywords, tokenizer=tokenizer)
    want = theirs.generate(**prompts(), **keywords, tokenizer=tokenizer.to_transformers())
    assert torch.equal(out, want)
    ours.tokenizer = tokenizer
    try:
        assert torch.equal(generate(ours, **prompts(), **keywords), want)
    finally:
        ours.tokenizer = None


def test_stop_strings_need_a_tokenizer(ours: CausalLM) -> None:
    with pytest.raises(ArgumentError, match="tokenizer"):
        generate(ours, **prompts(), stop_strings="x", max_new_tokens=5)


@pytest.mark.parametrize("bad", ["", [], ["a", ""], [3]])
def test_bad_stop_strings(bad: Any, ours: CausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ArgumentError, match="stop_strings"):
        generate(ours, **prompts(), stop_strings=bad, tokenizer=tokenizer, max_new_tokens=5)


class Kept(TextStreamer):
    """Keeps the pieces."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pieces: list[str] = []
        self.ends = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.ends += stream_end


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_streamer_gives_the_text(
    skip_prompt: bool, seed: int, ours: CausalLM, tokenizer: Tokenizer
) -> None:
    ids = prompts(seed, (5,))["input_ids"]
    streamer = Kept(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    for _ in range(2):  # one streamer serves several generations
        streamer.pieces, streamer.ends = [], 0
        out = generate(ours, ids, max_new_tokens=30, streamer=streamer, eos_token_id=[])
        shown = out[0, 5:] if skip_prompt else out[0]
        assert "".join(streamer.pieces) == tokenizer.decode(shown, skip_special_tokens=True)
        assert streamer.ends == 1 and len([p for p in streamer.pieces if p]) > 8


@pytest.mark.parametrize(
    "wrong", [{"max_length": 2}, {"num_beams": 2}, {"top_p": -1.0, "max_new_tokens": 2}]
)
def test_a_stream_ends_though_nothing_begins(
    wrong: dict[str, Any], ours: CausalLM, tokenizer: Tokenizer
) -> None:
    streamer = Kept(tokenizer)
    asked: dict[str, Any] = {"do_sample": "top_p" in wrong, "streamer": streamer} | wrong
    with pytest.raises((ArgumentError, InputError)):
        generate(ours, **prompts(), **asked)
    assert streamer.ends == 1 and "".join(streamer.pieces) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_return_sequences": "2"},
        {"max_length": "9"},
        {"min_length": "9"},
        {"pad_token_id": "pad"},
        {"seed": "x", "do_sample": True},
        {"seed": 2**70, "do_sample": True},
    ],
)
def test_what_is_no_whole_number(wrong: dict[str, Any], ours: CausalLM) -> None:
    name = next(iter(wrong))
    limit = {} if name == "max_length" else {"max_new_tokens": 2}
    with pytest.raises(ArgumentError, match=f"{name} is .*expected a whole number"):
        generate(ours, **prompts(), **limit, **wrong)


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ({"logits_processor": [lambda ids, scores: scores[:, :5]]}, "processor gave .*, 5., exp"),
        ({"logits_processor": [lambda ids, scores: None]}, "processor gave .*NoneType"),
        ({"stopping_criteria": [lambda ids, _: torch.ones(7)]}, "criterion gave shape .7."),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [10**6]}, "allows .1000000., the model"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [-1]}, "allows .-1., the model"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
    ],
)
def test_hooks_that_give_what_cannot_be(hook: Any, says: str, ours: CausalLM) -> None:
    with pytest.raises(ArgumentError, match=says):
        generate(ours, **prompts(), max_new_tokens=3, **hook)


def test_streamer_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    streamer = Kept(tokenizer)
    for piece in ("caf", "Ã", "©", "Ġa"):
        streamer.put(torch.tensor([vocab[piece]]))
    assert streamer.pieces == ["caf", "é", " a"]
    streamer.put(torch.tensor([vocab["Ã"]]))
    streamer.end()
    assert "".join(streamer.pieces) == "café a\ufffd"


def test_streamer_prints(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    for piece in ("the", "caf", "Ġa"):
        streamer.put(torch.tensor([tokenizer.get_vocab()[piece]]))
    streamer.end()
    assert capsys.readouterr().out == "caf a\n"


def test_streamer_spaces_an_answer_as_after_its_prompt(tmp_path: Path) -> None:
    """A sentencepiece decoder drops the space that a text begins with."""
    tokenizer = Tokenizer.from_folder(tiny_tokenizers.sentencepiece(tmp_path))
    prompt, answer = (
        tokenizer.encode("the cat"),
        tokenizer.encode("the cat", add_special_tokens=False),
    )
    streamer = Kept(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.tensor([prompt]))
    for token in answer:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer.pieces) == " the cat" != tokenizer.decode(answer)


def test_streamer_takes_one_row(ours: CausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="batch of 3"):
        generate(ours, **prompts(), streamer=TextStreamer(tokenizer), max_new_tokens=5)


def test_transformers_streamers_work(
    ours: CausalLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, as_theirs = prompts(0, (5,))["input_ids"], cast(Any, tokenizer)
    streamer = transformers.TextIteratorStreamer(as_theirs, timeout=60)
    thread = threading.Thread(
        target=generate, args=(ours, ids), kwargs={"max_new_tokens": 20, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(generate(ours, ids, max_new_tokens=20)[0])
    generate(ours, ids, max_new_tokens=20, streamer=transformers.TextStreamer(as_theirs))
    assert capsys.readouterr().out == text + "\n"


def test_a_stream_ends_when_generation_fails(ours: CausalLM, tokenizer: Tokenizer) -> None:
    streamer = Kept(tokenizer)

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    ids = prompts(0, (5,))["input_ids"]
    with pytest.raises(RuntimeError, match="on purpose"):
        generate(ours, ids, streamer=streamer, logits_processor=[fail], max_new_tokens=5)
    assert streamer.ends == 1


def test_processors_and_criteria_of_transformers(pair: tuple[Any, CausalLM]) -> None:
    theirs, ours = pair
    keywords: dict[str, Any] = {
        "max_new_tokens": 30,
        "logits_processor": transformers.LogitsProcessorList(
            [transformers.NoRepeatNGramLogitsProcessor(2)]
        ),
        "stopping_criteria": transformers.StoppingCriteriaList(
            [transformers.MaxLengthCriteria(max_length=17)]
        ),
    }
    out = generate(ours, **prompts(), **keywords)
    assert torch.equal(out, theirs.generate(**prompts(), **keywords)) and out.shape[1] == 17


def test_samples_repeat_with_their_seed(ours: CausalLM) -> None:
    before = torch.get_rng_state()
    common: dict[str, Any] = {
        "max_new_tokens": 15,
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 0,
    }
    common |= {"eos_token_id": []}
    one = generate(ours, **prompts(), **common, seed=1)
    assert torch.equal(one, generate(ours, **prompts(), **common, seed=1))
    g = torch.Generator().manual_seed(1)
    assert torch.equal(one, generate(ours, **prompts(), **common, generator=g))
    assert not torch.equal(one, generate(ours, **prompts(), **common, seed=2))
    assert not torch.equal(
        generate(ours, **prompts(), **common), generate(ours, **prompts(), **common)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_several_answers_to_each_prompt(ours: CausalLM) -> None:
    out = generate(
        ours, **prompts(), do_sample=True, num_return_sequences=4, seed=0, max_new_tokens=6
    )
    assert out.shape == (12, 15)
    assert torch.equal(out[:, :9], prompts()["input_ids"].repeat_interleave(4, 0))
    assert len({tuple(row.tolist()) for row in out[:4]}) > 1


def test_mode_and_dropout_are_left_alone(pair: tuple[Any, CausalLM]) -> None:
    _, plain = pair
    ours = bridge(plain.origin.folder)
    g = torch.Generator().manual_seed(0)
    adapter = LoRA(torch.randn(4, 48, generator=g), torch.randn(48, 4, generator=g), 0.1, 0.9)
    ours.set_adapters({"layers": [{"attn": {"q": adapter}}, None, None]})
    for training in (True, False):
        ours.train(training)
        outs = [generate(ours, **prompts(), max_new_tokens=10) for _ in range(2)]
        assert torch.equal(*outs) and ours.training is training
    assert not torch.equal(outs[0], generate(plain, **prompts(), max_new_tokens=10))
    assert ours.dropout_step == 0 and not outs[0].is_inference()


@pytest.mark.parametrize(
    ("keywords", "error", "says"),
    [
        ({"penalty_alpha": 0.6}, NotImplementedError, "penalty_alpha=0.6"),
        ({"bad_words_ids": [[]]}, ArgumentError, "bad_words_ids"),
        ({"sequence_bias": [[1, 2.0]]}, ArgumentError, "sequence_bias"),
        ({"generation_config": {"penalty_alpha": 0.6}}, NotImplementedError, "alpha=0.6"),
        ({"generation_config": 3}, ArgumentError, "int"),
        ({"max_new_token": 4}, TypeError, "did you mean 'max_new_tokens'"),
        ({"zzz": 4}, TypeError, "'zzz'"),
        ({"do_sample": True, "temperature": 0}, ArgumentError, "do_sample=False"),
        ({"do_sample": True, "temperature": -1.0}, ArgumentError, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, ArgumentError, "top_p"),
        ({"do_sample": True, "top_k": -1}, ArgumentError, "top_k"),
        ({"repetition_penalty": 0.0}, ArgumentError, "repetition_penalty"),
        ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, ArgumentError, "both"),
        ({"num_return_sequences": 2}, ArgumentError, "num_return_sequences is 2"),
        ({"max_new_tokens": 0}, ArgumentError, "max_new_tokens is 0"),
        ({"max_new_tokens": 56}, InputError, "65.*64"),
        ({"eos_token_id": [1.5]}, ArgumentError, "eos_token_id"),
        ({"attention_mask": torch.ones(3, 8)}, InputError, r"\[3, 8\]"),
        ({"attention_mask": [1, 1]}, InputError, "list"),
        ({"inputs": torch.ones(1, 1, dtype=torch.long)}, ArgumentError, "inputs"),
        ({"input_ids": [[1, 2]]}, InputError, "return_tensors='pt'"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, InputError, r"\[1, 0\]"),
        ({"input_ids": torch.tensor([[99]])}, InputError, "0..98"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, InputError, "65.*64"),
    ],
)
def test_bad_input(
    keywords: dict[str, Any], error: type[Exception], says: str, ours: CausalLM
) -> None:
    given = {**prompts(), **keywords}
    if "max_new_token" not in "".join(keywords):
        given["max_new_tokens"] = 4
    if "input_ids" in keywords:
        del given["attention_mask"]
    with pytest.raises(error, match=says):
        generate(ours, **given)


def test_golden_story() -> None:
    """llama2.c's stories260K, greedy from BOS."""
    folder = assets.shared("assets/stories260K")
    tokenizer = Tokenizer.from_folder(folder)
    out = generate(bridge(folder, tokenizer), torch.tensor([[1]]), max_new_tokens=200)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the park."
    )


def test_in_bf16_a_trained_model_answers_as_eager_code_does() -> None:
    """But at ties, which are counted: where ours is not eager bf16's best token, it is behind by
    less than eager's own spread about fp32 in that answer, and so at no more than 1% of the steps.
    """
    folder = Path(purelm.__file__).parent / "data"
    ours, tokenizer = FastLanguageModel.from_pretrained(
        "purelm/tiny", load_in_4bit=False, dtype="bfloat16", device_map="cpu"
    )
    low, high = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    rows = (folder / "instructions" / "heldout.jsonl").read_text().splitlines()
    talks = [json.loads(row)["messages"] for row in rows]
    texts = [" ".join(message["content"] for message in talk) for talk in talks]
    prompts = [ids[:10] for ids in (tokenizer(text)["input_ids"] for text in texts)]
    ids = torch.tensor([p for p in prompts if len(p) == 10][:30])
    out = ours.generate(ids, max_new_tokens=40, eos_token_id=[], do_sample=False)
    with torch.no_grad():
        eager, exact = (model(out).logits[:, 9:-1].float() for model in (low, high))
    chosen = eager.gather(-1, out[:, 10:, None])[..., 0]
    behind = eager.amax(-1) - chosen
    spread = (eager - exact).abs().amax((1, 2))
    assert behind.shape == (30, 40) and bool((behind <= spread[:, None]).all())
    assert int((behind > 0).sum()) <= behind.numel() // 100
