"""What an answer's text must be: a JSON value, a regular expression, a choice or a grammar."""

from __future__ import annotations

import json as json_lib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class Constraint:
    """One of: json, a JSON schema (text, or an object that becomes text; a class with
    `model_json_schema`, as pydantic's, gives its own); json_object, any JSON object; regex, of the
    whole answer; choice, one of these texts; grammar, in GBNF (the `root` rule). The names are
    vLLM's. Raises ArgumentError.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ArgumentError(
                f"a constraint has {' and '.join(given) or 'nothing'}, expected one of "
                + ", ".join(_KINDS)
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            texts = self.choice
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise ArgumentError(f"choice is {texts!r}, expected texts")
            if not texts:
                raise ArgumentError("choice has no texts, expected one or more")
            object.__setattr__(self, "choice", tuple(texts))
        object.__setattr__(self, "json_object", bool(self.json_object))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ArgumentError(f"{name} is {text!r}, expected a text that is not empty")

    @property
    def pattern(self) -> str | None:
        """The regular expression, that of a choice too."""
        if self.choice is not None:
            return "|".join(f"({re.escape(text)})" for text in self.choice)
        return self.regex


def read(given: Any) -> Constraint | None:
    """Ours of ours, of vLLM's structured outputs, of a dict, or of None. Raises ArgumentError."""
    if given is None or isinstance(given, Constraint):
        return given
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(_KINDS))
        if unknown:
            raise ArgumentError(f"a constraint has {unknown}, expected one of {list(_KINDS)}")
        return Constraint(**given)
    found = {name: getattr(given, name) for name in _KINDS if hasattr(given, name)}
    if not found:
        raise ArgumentError(f"the constraint is {given!r:.100}, expected a purelm.Constraint")
    return Constraint(**found)


def _schema(given: Any) -> str:
    if hasattr(given, "model_json_schema"):
        given = given.model_json_schema()
    if not isinstance(given, str):
        try:
            return json_lib.dumps(given)
        except (TypeError, ValueError) as problem:
            raise ArgumentError(f"the JSON schema cannot be written as JSON: {problem}") from None
    try:
        json_lib.loads(given)
    except (ValueError, RecursionError) as problem:
        raise ArgumentError(f"the JSON schema is not JSON: {problem}") from None
    return given
