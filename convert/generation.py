"""`model.generate`: Hugging Face's keywords and generation_config.json over `nn.generate`."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArgumentError
from ..nn.beam import search
from ..nn.generate import Stop
from ..nn.generate import generate as run
from ..nn.row_scores import Adjust
from ..nn.speculate import speculate
from .bridge import CausalLM
from .constraint import read as read_constraint
from .end_ids import end_ids
from .generation_hooks import (
    allowed_by,
    any_of,
    constrained,
    criterion_hook,
    generator_of,
    processed,
)
from .generation_keywords import Settings, check_options
from .generation_method import beams_of, draft_of
from .generation_output import GenerationOutput, Record
from .generation_prompt import least_tokens, new_tokens, prompts_of
from .generation_rules import sampling_of
from .grammar import Grammar
from .stop_strings import stop_strings as stop_at

Ids = int | Sequence[int] | torch.Tensor | None


def generate(
    model: CausalLM,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    inputs: torch.Tensor | None = None,
    generation_config: Any = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int | None = None,
    min_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    sequence_bias: Any = None,
    bad_words_ids: Sequence[Sequence[int]] | None = None,
    suppress_tokens: Sequence[int] | None = None,
    eos_token_id: Ids = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    logits_processor: Sequence[Callable[..., Any]] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], Any] | None = None,
    constraint: Any = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    num_return_sequences: int | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    renormalize_logits: bool | None = None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int | None = None,
    assistant_model: CausalLM | None = None,
    num_assistant_tokens: int | None = None,
    num_assistant_tokens_schedule: str | None = None,
    assistant_confidence_threshold: float | None = None,
    return_dict_in_generate: bool | None = None,
    output_scores: bool | None = None,
    output_logits: bool | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> torch.Tensor | GenerationOutput:
    """Prompts input_ids [b, s] -> prompts and answers [b * num_return_sequences, s + n].

    The keywords are transformers'. None means: as `generation_config` (ours, transformers' or a
    dict) says, else the model's own generation_config.json, else transformers' default (greedy; 20
    new tokens, with a warning; top_k 50 where it samples). max_new_tokens counts without the
    prompt, max_length with it; a limit of a file ends at the model's context, one of the call that
    passes it raises.

    A row ends at any of eos_token_id: those of the call, or of `generation_config`, or else all
    that the model's files name: generation_config.json, config.json, the tokenizer's eos, and the
    special token that ends a turn in its chat template; `[]`: never. Padding is chosen where
    none is named. Without an attention_mask, pad tokens in the prompt are taken for padding unless
    they also end a row.

    stop_strings: see `stop_strings.stop_strings`; tokenizer defaults to the model's. streamer: any
    object with put and end. logits_processor and stopping_criteria: callables (input_ids, scores).
    prefix_allowed_tokens_fn: (prompt's number, ids of a row) -> ids that may come next. constraint:
    a `Constraint` that every answer's text keeps to, or one or None for each prompt; it needs the
    tokenizer and ends with an end token. presence_penalty and frequency_penalty are OpenAI's.
    num_beams: beam search, see `nn.beam.BeamSearch`; the best num_return_sequences answers of each
    prompt.

    prompt_lookup_num_tokens or assistant_model: guess so many tokens ahead and check them in one
    pass, by what followed the last max_matching_ngram_size (2) tokens or fewer before, or by a
    smaller model with the same tokens, which guesses num_assistant_tokens (20) and stops at one
    less likely than assistant_confidence_threshold (0.4). num_assistant_tokens_schedule:
    "constant", or "heuristic", where they become two more after all were right and else one fewer,
    in every call anew ("heuristic_transient" says the same). Greedy ids are those without guesses;
    samples are other draws from the same distribution. It pays for few rows: all go on by what the
    row keeps that keeps fewest.

    return_dict_in_generate: the answer as a `GenerationOutput`, with output_scores and
    output_logits what every token was chosen from.
    seed or generator: what samples are drawn from; without both a fresh seed. No other generator
    moves. Adapters' dropout is off; the model's training mode is neither read nor changed.

    On a GPU the graphs of a call and their cache are kept for calls of the same batch size, rules
    and nearly the same length, up to a tenth of the device's memory, until `for_training()`.

    Raises ArgumentError, InputError; NotImplementedError for keywords of transformers that do not
    work yet, set to anything but their default; TypeError for unknown ones.
    """
    call = {**locals()}
    check_options(options, inspect.signature(generate).parameters)
    if input_ids is not None and inputs is not None:
        raise ArgumentError("both inputs and input_ids are given; they are the same keyword")
    try:
        own = model.generation_config.to_dict()
        setting = Settings.of(call, generation_config, own)
        return _answers(model, inputs if input_ids is None else input_ids, setting)
    finally:
        # Also after an error: whoever reads the stream in another thread would wait for ever.
        if streamer is not None:
            streamer.end()


def _answers(
    model: CausalLM, ids: torch.Tensor | None, setting: Settings
) -> torch.Tensor | GenerationOutput:
    call, tokenizer = setting.call, setting.call["tokenizer"]
    tokenizer, streamer = model.tokenizer if tokenizer is None else tokenizer, call["streamer"]
    eos = end_ids(setting.asked("eos_token_id"), model.generation_config, model.config, tokenizer)
    prompts = prompts_of(model, ids, call["attention_mask"], setting, eos, tokenizer)
    count = len(prompts.ids)
    samples, copies = setting("do_sample", False), setting.whole("num_return_sequences", 1) or 0
    beams = beams_of(setting, samples=samples, copies=copies, streamer=streamer)
    draft = draft_of(model, call["assistant_model"], setting, searches=beams is not None)
    if beams is None:
        if copies < 1 or (copies > 1 and not samples):
            raise ArgumentError(
                f"num_return_sequences is {copies}; several need do_sample=True or num_beams: "
                "greedy ones are equal"
            )
        prompts = prompts.copied(copies)
    new, least = new_tokens(model, prompts, setting), least_tokens(prompts, setting)
    record = Record(bool(setting("output_scores")), bool(setting("output_logits")))
    recorded = record.want_scores or record.want_logits
    as_output = setting("return_dict_in_generate", False)
    if recorded and not as_output:
        raise ArgumentError("output_scores and output_logits need return_dict_in_generate=True")
    how: dict[str, Any] = {
        "mask": prompts.mask,
        "adapters": model.adapters,
        "max_new_tokens": new,
        "sampling": sampling_of(setting, samples=samples, least=least, eos=eos),
        "eos_ids": eos,
        "pad_id": prompts.pad_id,
        "adjust": _adjust(setting, count, tokenizer, model.spec.vocab, eos),
        "stop": _stop(setting, tokenizer),
        "on_scores": record if recorded else None,
        "cache_dtype": model.cache_dtype,
    }
    params, spec = model.computed_params(), model.spec
    if beams is not None:
        found = search(params, spec, prompts.ids, beams, **how)
        return record.output_of_beams(found) if as_output else found.sequences
    how["generator"] = generator_of(call["seed"], call["generator"]) if samples else None
    # What is derived is made anew each time, so graphs over it are of no use to another call.
    how["kept"] = None if model.derives() else model.kept_steps
    if streamer is not None:
        streamer.put(prompts.ids.cpu())
        how["on_token"] = lambda token: streamer.put(token.cpu())
    if draft is not None:
        sequences = speculate(params, spec, prompts.ids, draft, **how)
    else:
        sequences = run(params, spec, prompts.ids, **how)
    return record.output(sequences) if as_output else sequences


def _adjust(
    setting: Settings, prompts: int, tokenizer: Any, vocab: int, eos: list[int]
) -> Adjust | None:
    """The call's processors and what rules out tokens, as one hook."""
    call = setting.call
    processors = [*(call["logits_processor"] or ())]
    if call["prefix_allowed_tokens_fn"] is not None:
        processors.append(allowed_by(call["prefix_allowed_tokens_fn"], prompts))
    if call["constraint"] is not None:
        grammars = _grammars(call["constraint"], prompts, tokenizer, vocab, eos)
        processors.append(constrained(grammars))
    return processed(processors) if processors else None


def _stop(setting: Settings, tokenizer: Any) -> Stop | None:
    """The call's criteria and stop strings, as one hook."""
    stops = [criterion_hook(one) for one in setting.call["stopping_criteria"] or ()]
    strings = setting("stop_strings")
    if strings is not None:
        stops.append(stop_at(strings, tokenizer))
    return any_of(stops) if stops else None


def _grammars(
    given: Any, prompts: int, tokenizer: Any, vocab: int, eos: list[int]
) -> list[Grammar | None]:
    """One a prompt."""
    many = isinstance(given, list | tuple)
    every = [read_constraint(one) for one in (given if many else [given] * prompts)]
    if len(every) != prompts:
        raise ArgumentError(f"{len(every)} constraints for {prompts} prompts")
    made = {one: Grammar(one, tokenizer, vocab, eos) for one in every if one is not None}
    return [None if one is None else made[one] for one in every]
