"""How a `generate` call chooses tokens beyond one at a time, from transformers' keywords."""

from typing import Any

from ..errors import ArgumentError
from ..nn.beam import BeamSearch
from ..nn.draft import Draft, DraftModel, NGrams
from .bridge import CausalLM
from .generation_keywords import Settings

# transformers' defaults.
NGRAM, GUESSES, CONFIDENCE = 2, 20, 0.4
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
# So many tokens of two vocabularies are compared.
COMPARED = 1024


def beams_of(setting: Settings, *, samples: bool, copies: int, streamer: Any) -> BeamSearch | None:
    """None where no beams are asked for.

    Raises ArgumentError, and NotImplementedError for sampled beams.
    """
    beams = setting("num_beams", 1)
    if beams == 1:
        return None
    if samples:
        raise NotImplementedError(
            f"num_beams={beams} with do_sample=True (sampled beams) does not work yet; pass "
            "do_sample=False or num_beams=1"
        )
    if streamer is not None:
        raise ArgumentError(
            f"num_beams is {beams}: which tokens an answer has is known when the search has ended, "
            "so none can be streamed; leave out the streamer or num_beams"
        )
    return BeamSearch(
        beams=beams,
        answers=copies,
        length_penalty=setting("length_penalty", 1.0),
        early_stopping=setting("early_stopping", False),
        renormalize=bool(setting("renormalize_logits", False)),
    )


def draft_of(
    model: CausalLM,
    assistant: Any,
    setting: Settings,
    *,
    searches: bool,
) -> Draft | None:
    """Who guesses the tokens to come; None where nobody is asked to.

    What the call asks for comes before what the assistant's generation_config says. searches: beams
    are asked for. Raises ArgumentError.
    """
    looked_up = setting("prompt_lookup_num_tokens")
    if looked_up is None and assistant is None:
        return None
    name = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
    if looked_up is not None and assistant is not None:
        raise ArgumentError(
            "prompt_lookup_num_tokens and assistant_model are both given; one of them guesses"
        )
    if searches:
        raise ArgumentError(f"{name} guesses tokens of one answer, not of beams; pass num_beams=1")
    if assistant is None:
        return NGrams(looked_up, setting("max_matching_ngram_size", NGRAM))
    _check_assistant(model, assistant)

    def own(name: str, default: Any) -> Any:
        found = (setting.asked(name), assistant.generation_config.to_dict().get(name), default)
        return next(value for value in found if value is not None)

    return DraftModel(
        assistant.computed_params(),
        assistant.spec,
        assistant.adapters,
        tokens=own("num_assistant_tokens", GUESSES),
        confidence=own("assistant_confidence_threshold", CONFIDENCE),
        adapts=_adapts(own("num_assistant_tokens_schedule", "constant")),
    )


def _adapts(schedule: Any) -> bool:
    if schedule not in SCHEDULES:
        raise ArgumentError(
            f"num_assistant_tokens_schedule is {schedule!r}, expected one of {SCHEDULES}"
        )
    return bool(schedule != "constant")


def _check_assistant(model: CausalLM, assistant: Any) -> None:
    """Raise ArgumentError for who cannot guess for the model.

    Of tokenizers the lengths and COMPARED tokens are looked at: were others different, guesses
    would be worse, and answers the same.
    """
    if not isinstance(assistant, CausalLM):
        raise ArgumentError(
            f"assistant_model is a {type(assistant).__name__}, expected another model of purelm's"
        )
    if assistant.device != model.device:
        raise ArgumentError(
            f"assistant_model is on {assistant.device}, the model on {model.device}; load both on "
            "one device"
        )
    ours, theirs = model.tokenizer, assistant.tokenizer
    if ours is None or theirs is None:
        if model.spec.vocab != assistant.spec.vocab:
            raise ArgumentError(
                f"assistant_model has {assistant.spec.vocab} tokens, the model {model.spec.vocab}: "
                "it must have the same tokenizer"
            )
        return
    if ours is theirs:
        return
    count = len(ours)
    some = range(0, count, max(1, count // COMPARED))
    if count != len(theirs):
        found = f"{len(theirs)} tokens, not {count}"
    else:
        mine, others = (t.convert_ids_to_tokens(list(some)) for t in (ours, theirs))
        at = next((i for i in range(len(some)) if mine[i] != others[i]), None)
        if at is None:
            return
        found = f"{others[at]!r} for token {some[at]}, not {mine[at]!r}"
    raise ArgumentError(
        f"assistant_model's tokenizer has {found}: its guesses would be of other texts; take a "
        "model with the same tokenizer"
    )
