"""What is wrong with a tokenizer as its repository ships it, and the one repair that is safe.

`diagnose` only looks. `repair` gives the tokenizer a pad token that is not an eos token, since a
model trained with pad = eos learns never to stop; everything else is left to the user to decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import TemplateError
from .tokenizer import Tokenizer

# Where a pad token is looked for, in this order: names that mean it, then names that no text uses.
PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<|finetune_right_pad|>",
    "<pad>",
    "[PAD]",
    "<PAD>",
    "<|endoftext|>",
    "<fim_pad>",
    "<|fim_pad|>",
    "<\uff5c\u2581pad\u2581\uff5c>",
    "[MASK]",
)
PAD_PREFIXES = ("<|reserved", "<|placeholder", "<|dummy_", "[control")
_BRACKETED_PAD = re.compile(r"[<\[{].*pad.*[>\]}]", re.IGNORECASE)
NEW_PAD = "<|pad|>"

_QUESTION = {"role": "user", "content": "question"}
_ANSWER = {"role": "assistant", "content": "answer"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `kind` is one of

    pad-missing, pad-is-eos, pad-out-of-range, ids-out-of-range, eos-missing, double-bos,
    template-fails, template-ignores-generation-prompt, end-of-turn-not-eos.
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Change:
    """What `repair` did to a field. `rows`: how many rows the embedding must grow by, mostly 0."""

    field: str
    before: str | None
    after: str | None
    why: str
    rows: int = 0


def diagnose(
    tokenizer: Tokenizer, *, vocab_rows: int | None = None, eos_ids: Iterable[int] = ()
) -> list[Finding]:
    """What is wrong with `tokenizer`, which is not changed.

    `vocab_rows` is the number of rows of the model's embedding, `eos_ids` the eos ids of its
    configuration and generation configuration; without them what needs them is not looked at.
    """
    stops = _stops(tokenizer, eos_ids)
    found = [*_pad_findings(tokenizer, stops, vocab_rows)]
    if not stops:
        found.append(Finding("eos-missing", "no token ends a text: there is no eos token"))
    if vocab_rows is not None:
        beyond = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= vocab_rows)
        if beyond:
            named = ", ".join(f"{text!r} ({index})" for index, text in beyond[:5])
            found.append(
                Finding(
                    "ids-out-of-range",
                    f"{len(beyond)} tokens have ids beyond the {vocab_rows} rows of the embedding: "
                    f"{named}; a text that holds one cannot be run until the embedding grows",
                )
            )
    if tokenizer.chat_template is not None:
        found += _template_findings(tokenizer, stops)
    return found


def repair(
    tokenizer: Tokenizer, *, vocab_rows: int | None = None, eos_ids: Iterable[int] = ()
) -> list[Change]:
    """Gives `tokenizer`, in place, a usable pad token, and says what was changed.

    A pad token that is missing, is an eos token, or has no row in the embedding is replaced by the
    first that the vocabulary has of `PAD_NAMES`, then of `PAD_PREFIXES` (the lowest id), then any
    added token with "pad" in brackets, then the unk token. It is never an eos or bos token. Where
    there is none, a new token takes a spare row of the embedding; where there is no spare row
    either, the pad token is left unset and the change says how many rows are needed.
    """
    stops = _stops(tokenizer, eos_ids)
    problems = _pad_findings(tokenizer, stops, vocab_rows)
    if not problems:
        return []
    why, before = problems[0].message, tokenizer.pad_token
    chosen = _choose(tokenizer, stops, vocab_rows)
    if chosen is not None:
        tokenizer.pad_token = chosen
        return [Change("pad_token", before, chosen, why)]
    next_id = max(tokenizer.get_vocab().values(), default=-1) + 1
    if vocab_rows is not None and next_id < vocab_rows:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
        return [Change("pad_token", before, NEW_PAD, f"{why}; it takes the spare row {next_id}")]
    rows = 1 if vocab_rows is None else next_id + 1 - vocab_rows
    tokenizer.pad_token = None
    why += (
        "; no token can serve and no row is spare: "
        f"add_special_tokens({{'pad_token': {NEW_PAD!r}}}) "
        f"and resize_model_vocab={next_id + 1} ({rows} more rows)"
    )
    return [Change("pad_token", before, None, why, rows)]


def _stops(tokenizer: Tokenizer, eos_ids: Iterable[int]) -> set[int]:
    own = tokenizer.eos_token_id
    return {*eos_ids, *(() if own is None else (own,))}


def _pad_findings(
    tokenizer: Tokenizer, stops: Collection[int], vocab_rows: int | None
) -> list[Finding]:
    pad, index = tokenizer.pad_token, tokenizer.pad_token_id
    if pad is None or index is None:
        return [Finding("pad-missing", "there is no pad token")]
    if index in stops:
        return [Finding("pad-is-eos", f"the pad token {pad!r} is an eos token")]
    if vocab_rows is not None and index >= vocab_rows:
        message = f"the pad token {pad!r} has the id {index}, the embedding {vocab_rows} rows"
        return [Finding("pad-out-of-range", message)]
    return []


def _choose(tokenizer: Tokenizer, stops: Collection[int], vocab_rows: int | None) -> str | None:
    vocabulary = tokenizer.get_vocab()
    added = sorted(tokenizer.added_tokens_decoder)
    names = [tokenizer.added_tokens_decoder[index].content for index in added]
    candidates = list(PAD_NAMES)
    candidates += [n for prefix in PAD_PREFIXES for n in names if n.startswith(prefix)]
    candidates += [name for name in names if _BRACKETED_PAD.fullmatch(name)]
    if tokenizer.unk_token is not None:
        candidates.append(tokenizer.unk_token)
    for name in candidates:
        index = vocabulary.get(name)
        if index is None or index in stops or name == tokenizer.bos_token:
            continue
        if vocab_rows is None or index < vocab_rows:
            return name
    return None


def _template_findings(tokenizer: Tokenizer, stops: Collection[int]) -> list[Finding]:
    from .assistant_turns import assistant_spans

    try:
        plain = tokenizer.apply_chat_template([_QUESTION], tokenize=False)
        asked = tokenizer.apply_chat_template(
            [_QUESTION], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as problem:
        return [Finding("template-fails", f"the chat template fails on one question: {problem}")]
    found = []
    bos = tokenizer.bos_token
    if bos and plain.startswith(bos) and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        found.append(
            Finding(
                "double-bos",
                f"the chat template writes {bos!r} and the tokenizer adds it too: tokenize "
                "rendered text with add_special_tokens=False, as apply_chat_template does",
            )
        )
    if plain == asked:
        found.append(
            Finding(
                "template-ignores-generation-prompt",
                "the chat template writes the same with and without add_generation_prompt, so the "
                "model is not told that it is its turn",
            )
        )
    try:
        turn = assistant_spans(
            tokenizer.get_chat_template(),
            [_QUESTION, _ANSWER],
            special_tokens=tokenizer.special_tokens_map,
        )
    except TemplateError as problem:
        return [*found, Finding("template-fails", f"the assistant's turn is not found: {problem}")]
    start, end = turn.spans[-1]
    marker = turn.text[start:end].rpartition(_ANSWER["content"])[2].strip()
    ids = set(tokenizer.encode(marker, add_special_tokens=False)) if marker else set()
    if not ids & set(stops):
        found.append(
            Finding(
                "end-of-turn-not-eos",
                f"the chat template ends a turn with {marker!r} (ids {sorted(ids)}), none of which "
                f"is an eos id {sorted(stops)}: generation would not stop there",
            )
        )
    return found
