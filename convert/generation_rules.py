"""The sampling rules of a `generate` call from transformers' keywords."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError
from ..nn.sampling import Sampling
from .generation_keywords import Settings


def sampling_of(setting: Settings, *, samples: bool, least: int, eos: Collection[int]) -> Sampling:
    """least: minimum of new tokens.

    Greedy leaves the warpers (temperature to typical_p) out, as transformers does. Of bad_words_ids
    a word that is one of `eos` alone is left out, as there. Raises ArgumentError.
    """
    warpers: dict[str, Any] = {}
    if samples:
        warpers = {
            "temperature": _positive(setting("temperature", 1.0)),
            "top_k": setting("top_k", 50),
            "top_p": setting("top_p", 1.0),
            "min_p": setting("min_p", 0.0),
            "typical_p": setting("typical_p", 1.0),
        }
    words = _sequences("bad_words_ids", setting("bad_words_ids", ()))
    return Sampling(
        **warpers,
        repetition_penalty=setting("repetition_penalty", 1.0),
        min_new_tokens=least,
        presence_penalty=setting("presence_penalty", 0.0),
        frequency_penalty=setting("frequency_penalty", 0.0),
        no_repeat_ngram_size=setting("no_repeat_ngram_size", 0),
        sequence_bias=_biases(setting("sequence_bias", ())),
        bad_words_ids=tuple(w for w in words if not (len(w) == 1 and w[0] in eos)),
        suppress_tokens=_ids("suppress_tokens", setting("suppress_tokens", ())),
    )


def _positive(temperature: Any) -> Any:
    if temperature == 0:
        raise ArgumentError("temperature is 0 while sampling; for greedy pass do_sample=False")
    return temperature


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"{name} is {value!r}, expected a list of token ids")
    return tuple(value)


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"{name} is {value!r}, expected a list of lists of token ids")
    return tuple(_ids(name, ids) for ids in value)


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """From transformers' two forms: {(id, ...): bias} and [[[id, ...], bias], ...]."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, Sequence) or any(
        not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 for pair in pairs
    ):
        raise ArgumentError(
            f"sequence_bias is {value!r}, expected {{(id, ...): bias}} or [[[id, ...], bias], ...]"
        )
    return tuple((_ids("sequence_bias", ids), bias) for ids, bias in pairs)
