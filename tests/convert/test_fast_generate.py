"""fast_inference=True: many prompts over the model's own weights, called as vLLM's generate."""

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from purelm import Engine, FastLanguageModel, Request, Sampling, SamplingParams
from purelm.convert import engine_stats, fast_inference
from purelm.errors import ArgumentError, InputError
from purelm.nn import lora, pages, tree
from purelm.nn.generate import generate
from purelm.nn.pages import PAGE

TEXTS = ["The capital of France is", "A list of colours:", "Once"]


def load(**arguments: Any) -> tuple[Any, Any]:
    given = {"load_in_4bit": False, "dtype": "float32", "device_map": "cpu", **arguments}
    return FastLanguageModel.from_pretrained("purelm/tiny", **given)


@pytest.fixture(scope="module")
def loaded() -> Any:
    model, tokenizer = load(fast_inference=True, max_lora_rank=8, max_seq_length=256)
    return FastLanguageModel.get_peft_model(model, r=8, random_state=1), tokenizer


@pytest.fixture(scope="module")
def model(loaded: Any) -> Any:
    return loaded[0]


def wanted(model: Any, ids: list[int], **keywords: Any) -> list[int]:
    out = model.generate(torch.tensor([ids]), **keywords)
    return [int(t) for t in out[0, len(ids) :]]


def test_prompts_in_every_form_give_what_generate_gives(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    want = [wanted(model, one, max_new_tokens=12, do_sample=False) for one in ids]
    forms: list[Any] = [TEXTS, ids, [{"prompt": t} for t in TEXTS]]
    forms += [[{"prompt_token_ids": i} for i in ids], [torch.tensor(i) for i in ids]]
    for prompts in forms:
        outputs = model.fast_generate(prompts, greedy)
        assert [o.outputs[0].token_ids for o in outputs] == want
        assert [o.prompt_token_ids for o in outputs] == ids and all(o.finished for o in outputs)
    (one,) = model.fast_generate(TEXTS[0], sampling_params={"temperature": 0, "max_tokens": 12})
    assert one.prompt == TEXTS[0] and one.outputs[0].token_ids == want[0]
    assert one.outputs[0].text == tokenizer.decode(want[0], skip_special_tokens=True)
    (again,) = model.fast_generate(ids[0], greedy)
    assert again.prompt is None and again.outputs == one.outputs


def test_several_answers_and_their_seeds(loaded: Any) -> None:
    model, tokenizer = loaded
    params = SamplingParams(n=3, temperature=1.1, top_k=30, top_p=0.9, seed=5, max_tokens=9)
    (out,) = model.fast_generate(TEXTS[0], params)
    ids = tokenizer(TEXTS[0])["input_ids"]
    how = {"max_new_tokens": 9, "do_sample": True, "temperature": 1.1, "top_k": 30, "top_p": 0.9}
    assert [o.index for o in out.outputs] == [0, 1, 2]
    for i, answer in enumerate(out.outputs):
        assert answer.token_ids == wanted(model, ids, seed=5 + i, **how)


def test_a_params_object_of_another_library(model: Any) -> None:
    """Any object with vLLM's attributes; what it asks for that is not there is said."""
    theirs = SimpleNamespace(
        n=1, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, presence_penalty=0.0,
        frequency_penalty=0.0, repetition_penalty=1.0, max_tokens=5, min_tokens=0, stop=[],
        stop_token_ids=[], ignore_eos=False, include_stop_str_in_output=False, seed=None,
        logprobs=None, logit_bias=None, bad_words=[], skip_special_tokens=True, detokenize=True,
        prompt_logprobs=None, logits_processors=None, structured_outputs=None, output_kind=0,
    )  # fmt: skip
    ours = SamplingParams(temperature=0, max_tokens=5)
    got = [model.fast_generate(TEXTS[0], p)[0].outputs for p in (theirs, ours)]
    assert got[0] == got[1] and len(got[0][0].token_ids) == 5
    several = model.fast_generate(TEXTS[:2], [theirs, SamplingParams(max_tokens=3)])
    assert [len(o.outputs[0].token_ids) for o in several] == [5, 3]
    theirs.prompt_logprobs = 1
    with pytest.raises(NotImplementedError, match="prompt_logprobs"):
        model.fast_generate(TEXTS[0], theirs)


def test_ends_and_their_reasons(loaded: Any) -> None:
    model, tokenizer = loaded
    how: dict[str, Any] = {"temperature": 0, "ignore_eos": True}

    def answer(**more: Any) -> Any:
        return model.fast_generate(TEXTS[0], SamplingParams(**{**how, "max_tokens": 12, **more}))[
            0
        ].outputs[0]

    free = answer()
    assert free.finish_reason == "length" and free.stop_reason is None
    assert len(free.token_ids) == 12
    stop = tokenizer.decode(free.token_ids[:5])[-2:]
    first = free.text.index(stop)
    at = answer(stop=stop)
    assert (at.finish_reason, at.stop_reason, at.text) == ("stop", stop, free.text[:first])
    kept = answer(stop=[stop], include_stop_str_in_output=True)
    assert kept.text == free.text[: first + len(stop)] and kept.token_ids == at.token_ids
    token = free.token_ids[3]
    ended = answer(stop_token_ids=[token])
    n = free.token_ids.index(token)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    assert ended.token_ids == free.token_ids[: n + 1]
    assert ended.text == tokenizer.decode(free.token_ids[:n], skip_special_tokens=True)
    banned = answer(bad_words=[tokenizer.decode([token]).strip() or "x"])
    biased = answer(logit_bias={token: -100.0})
    assert token not in biased.token_ids and banned.finish_reason == "length"
    whole = answer(max_tokens=None)
    assert len(whole.token_ids) == model.spec.max_positions - len(tokenizer(TEXTS[0])["input_ids"])


def test_the_models_own_end(model: Any) -> None:
    engine = model.fast_inference.engine(model)
    end = engine.eos_ids[0]
    params = SamplingParams(temperature=0, max_tokens=6, logit_bias={end: 1000.0})
    (out,) = model.fast_generate(TEXTS[0], params)
    answer = out.outputs[0]
    assert (answer.token_ids, answer.text) == ([end], "")
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


def test_logprobs_are_the_models(loaded: Any) -> None:
    model, tokenizer = loaded
    params = SamplingParams(temperature=0.9, seed=0, max_tokens=3, logprobs=2)
    (out,) = model.fast_generate(TEXTS[1], params)
    answer, ids = out.outputs[0], tuple(out.prompt_token_ids)
    # The engine's own, which are held to the model's there.
    sampling = Sampling(temperature=0.9)
    request = Request(ids, 3, sampling=sampling, seed=0, logprobs=2)
    (events,) = Engine(model, tokenizer).answers([request])
    assert answer.token_ids == [event.token for event in events]
    for event, at in zip(events, answer.logprobs, strict=True):
        (first, best), (second, next_best) = event.logprobs.top
        assert set(at) == {event.token, first, second}
        assert [(at[i].rank, at[i].logprob) for i in (first, second)] == [
            (1, best),
            (2, next_best),
        ]
        assert at[event.token].logprob == event.logprobs.logprob
        assert at[event.token].decoded_token == tokenizer.decode([event.token])
    assert answer.cumulative_logprob == sum(event.logprobs.logprob for event in events)


def test_a_training_step_changes_the_next_sample_and_nothing_is_copied(loaded: Any) -> None:
    """One process trains and samples in turns; the prompts' prefixes were in the cache before."""
    model, tokenizer = loaded
    prompt = tokenizer(" ".join(TEXTS * 4))["input_ids"]
    assert len(prompt) > PAGE
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    engine = model.fast_inference.engine(model)
    before = model.fast_generate(prompt, greedy)[0].outputs[0].token_ids
    assert model.fast_generate(prompt, greedy)[0].outputs[0].token_ids == before
    assert engine._rows.known_tokens > 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    target = torch.tensor([prompt + list(reversed(before))])
    model.for_training()
    for _ in range(2):
        model(target, labels=target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.for_inference()
    after = model.fast_generate(prompt, greedy)[0].outputs[0].token_ids
    assert after != before
    assert after == wanted(model, prompt, max_new_tokens=10, do_sample=False, eos_token_id=[])
    held = {t.data_ptr() for t in model.parameters()}
    weights = engine._rows.weights
    ours = {t.data_ptr() for t in tree.tensors((weights.params, weights.adapters))}
    assert ours and ours <= held
    assert model.fast_inference.engine(model) is engine


def test_a_copy_has_an_engine_of_its_own(model: Any) -> None:
    engine = model.fast_inference.engine(model)
    other = copy.deepcopy(model)
    greedy = SamplingParams(temperature=0, max_tokens=4)
    assert other.fast_generate(TEXTS[0], greedy) == model.fast_generate(TEXTS[0], greedy)
    assert other.fast_inference.engine(other).model is other
    assert model.fast_inference.engine(model) is engine


def test_one_bad_prompt_leaves_the_engine_as_it_was(model: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    for prompt, error in (
        ([10**6], InputError),
        ([], InputError),
        (3.5, TypeError),
        (list(range(4, 200)) * 20, InputError),
    ):
        with pytest.raises(error):
            model.fast_generate([TEXTS[0], prompt] if prompt != 3.5 else prompt, params)
    assert len(model.fast_generate(TEXTS, params)) == 3
    assert model.fast_inference.engine(model).held_blocks == 0


# What is asked for at loading.


def test_memory_bounds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more blocks than fit beside what is in use; with an e4m3 cache about twice as many."""
    model, _ = load(fast_inference=True, max_seq_length=64)
    total, used = 64 * 2**20, 20 * 2**20
    monkeypatch.setattr(fast_inference, "memory", lambda model: (total, used))
    how = {"dtype": torch.float32, "columns": torch.float32}
    blocks = model.fast_inference.cache_blocks(model)
    room = total // 2 - used
    sizes = [pages.nbytes(model.spec, fast_inference.ROWS, blocks + n, **how) for n in (0, 1, 2)]
    assert sizes[1] <= room < sizes[2]
    assert model.fast_inference.engine(model)._rows.most_blocks == blocks + 1
    model.cache_dtype = torch.float8_e4m3fn
    assert model.fast_inference.cache_blocks(model) > 3.9 * blocks  # of one byte, not of four


def test_less_memory_than_a_row_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_inference, "memory", lambda model: (64 * 2**20, 31 * 2**20))
    with pytest.raises(ArgumentError, match=r"gpu_memory_utilization is 0\.5: of 64 MiB .*1 MiB"):
        load(fast_inference=True, max_seq_length=2048)
    load(fast_inference=False, max_seq_length=2048)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization"),
        ({"max_lora_rank": 0}, "max_lora_rank"),
        ({"max_lora_rank": 8.0}, "max_lora_rank"),
        ({"fast_inference": 1}, "fast_inference"),
        ({"float8_kv_cache": "yes"}, "float8_kv_cache"),
        ({"disable_log_stats": None}, "disable_log_stats"),
    ],
)
def test_bad_values(arguments: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        load(**arguments)


def test_ranks_over_the_largest_are_refused() -> None:
    model, _ = load(fast_inference=True, max_lora_rank=8)
    with pytest.raises(ArgumentError, match="rank 9, more than max_lora_rank=8"):
        FastLanguageModel.get_peft_model(model, r=9)
    with pytest.raises(ArgumentError, match="rank 16"):
        model.add_adapter("wide", r=4, rank_pattern={"q_proj": 16})
    assert not model.worn
    FastLanguageModel.get_peft_model(model, r=8)
    # Those that are worn stay on where others cannot take their place.
    wide = lora.init(model.spec, rank=9, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match="rank 9"):
        model.set_adapters(wide)
    assert model.active_adapters == ["default"]


def test_without_fast_inference_it_says_so() -> None:
    model, _ = load()
    with pytest.raises(ArgumentError, match="fast_inference=True"):
        model.fast_generate("x")


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        ({"n": 0}, ArgumentError, "n is 0"),
        ({"nonsense": 1}, ArgumentError, "nonsense"),
        (7, ArgumentError, "sampling_params is 7"),
        ({"bad_words": "word"}, ArgumentError, "bad_words"),
        ({"temperature": -1.0}, ArgumentError, "temperature"),
        ({"temperature": "hot"}, ArgumentError, "temperature is 'hot'"),
        ({"stop": 5}, ArgumentError, "stop is 5"),
        ({"stop_token_ids": ["a"]}, ArgumentError, "eos_ids"),
        ({"seed": "a"}, ArgumentError, "seed is 'a'"),
        ({"logit_bias": {"a": 1}}, ArgumentError, "logit_bias"),
        ({"logit_bias": {1: "a"}}, ArgumentError, "expected a number"),
        ([{}, {}], ArgumentError, "2 sampling_params for 1 prompts"),
        ({"use_beam_search": True}, NotImplementedError, "use_beam_search"),
    ],
)
def test_bad_sampling_params(model: Any, params: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        model.fast_generate(TEXTS[0], params)


# The cache in e4m3.


def test_an_e4m3_cache_takes_a_quarter_of_fp32_and_every_path_reads_it_alike() -> None:
    """generate, batches and the engine round alike, and not as a wide cache does."""
    model, tokenizer = load(fast_inference=True, float8_kv_cache=True)
    assert model.cache_dtype == torch.float8_e4m3fn
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": []}
    own = [wanted(model, one, **how) for one in ids]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = model.fast_generate(ids, greedy)
    assert [o.outputs[0].token_ids for o in outputs] == own
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert model.generate(**batch, **how)[:, -12:].tolist() == own
    assert model.generate(**batch, max_new_tokens=4, num_beams=2).shape[0] == 3


def test_what_an_e4m3_cache_rounds() -> None:
    """Keys and values are the e4m3 numbers nearest to the exact ones, and a step after a prompt
    reads the same as one pass over both."""
    from hybrids import prompt, small

    from purelm.nn import cache as kv
    from purelm.nn import decode

    for kind in ("full", "latent"):
        spec, params = small(kind)
        text = prompt(0, 2, 9)
        how: Any = {"padded": False, "dtype": torch.float64, "device": "cpu"}
        narrow = kv.empty(spec, 2, 12, **how, columns=torch.float8_e4m3fn)
        wide = kv.empty(spec, 2, 12, **how)
        assert narrow.layers[0]["keys"].nbytes * 8 == wide.layers[0]["keys"].nbytes
        got, narrow = decode.prefill(params, spec, text, narrow)
        _, wide = decode.prefill(params, spec, text, wide)
        # The first layer's are made of the same inputs.
        for name in ("keys", "values"):
            ours, exact = narrow.layers[0][name], wide.layers[0][name]
            nearest = exact.clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(ours.float(), nearest.float())
        step, _ = decode.decode(params, spec, text[:, -1], narrow)
        again = kv.empty(spec, 2, 12, **how, columns=torch.float8_e4m3fn)
        whole = torch.cat([text, text[:, -1:]], 1)
        want, _ = decode.prefill(params, spec, whole, again)
        torch.testing.assert_close(step, want)
        assert got.isfinite().all()
        args: Any = {"max_new_tokens": 3, "cache_dtype": torch.float8_e4m3fn}
        assert generate(params, spec, text, **args).shape == (2, 12)


# What it says.


def test_stats_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    stats = engine_stats.Stats(lambda: now)
    common = {"running": 3, "waiting": 2, "held": 0.25, "known": 40, "prompts": 80}
    with caplog.at_level(logging.INFO, "purelm.engine"):
        stats.note(tokens=30, **common)
        assert not caplog.records
        now = 20.0
        stats.note(tokens=10, **common)
        now = 25.0
        stats.note(tokens=10, **common)
    assert [r.getMessage() for r in caplog.records] == [
        "2.0 new tokens/s, 4.0 prompt tokens/s (50% known before), 3 running, 2 waiting, "
        "25.0% of the cache held"
    ]


@pytest.mark.parametrize("disabled", [True, False])
def test_disable_log_stats(
    disabled: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_stats, "EVERY", 0.0)
    model, _ = load(fast_inference=True, disable_log_stats=disabled)
    with caplog.at_level(logging.INFO, "purelm.engine"):
        model.fast_generate(TEXTS[0], SamplingParams(max_tokens=3))
    assert bool(caplog.records) is not disabled
