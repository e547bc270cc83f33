"""How long matching an expression can take that a tokenizer's file gives.

The tokenizers library matches by Oniguruma, which goes back and tries again. At one place of a text
of n characters that takes n^d steps, where d counts the unbounded repetitions before something that
can fail, and 2^n where one repeats what can match in several ways (`(a+)+$`). Publishers' own
patterns have d at most 1 (`\\s+(?!\\S)`); a file with more is refused, for the library can be
neither stopped nor given a limit of time; it fails when one place takes ten million steps. What is
counted are upper bounds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TokenizerError

_MAX_LENGTH = 10_000
_MAX_DEPTH = 40
# A repetition of up to so many counts as one of a fixed number.
_FEW = 64
# So many choices between two may be tried at one place, all of them together.
_CHOICES = 8
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[^}]*\}|x\{[^}]*\}|x[0-9a-fA-F]{0,2}|u[0-9a-fA-F]{4}|k<[^>]*>|[0-7]{1,3}|.)",
    re.DOTALL,
)
_INTERVAL = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?:(<?[=!])|(>)|:|<[A-Za-z_]\w*>|([im-]*)(:|\))))?")
_ANCHORS = "bBAzZGyYK"
# What was matched before, or a group's expression, or a letter with all its marks.
_UNBOUNDED = "gkX123456789"


@dataclass(frozen=True)
class _Part:
    """What matching a part of an expression can cost, as exponents d of n^d.

    ways: of the number of ways to match from one place; choices: the logarithm to 2 of how many
    there are however short the text. cost: of the steps to find that it does not match; waste: of
    those it takes beside the text that it matches. eats: whether that text has no bound; fails,
    empty: whether it can fail, and match nothing. first: the characters it can begin with, None if
    any.
    """

    ways: float = 0
    cost: float = 0
    waste: float = 0
    eats: bool = False
    fails: bool = True
    empty: bool = False
    choices: float = 0
    first: frozenset[str] | None = None

    @property
    def steps(self) -> float:
        """Of all that a match or its failure takes."""
        return max(self.cost, self.waste, float(self.eats))


_EMPTY = _Part(fails=False, empty=True, first=frozenset())


class _TooMuch(ValueError):
    """Syntax whose cost is not known."""


def check_patterns(part: Any, what: str, file: Path) -> None:
    """Raise TokenizerError for an expression in a part of the `tokenizers` library's backend, such
    as its pre-tokenizer, that can take more than n^2 steps in n characters.
    """
    for pattern in _patterns(json.loads(part.__getstate__()) if part is not None else None):
        if (steps := degree(pattern)) > 1:
            how = "2^n" if steps == math.inf else f"n^{steps + 1:.0f}"
            raise TokenizerError(
                f"the {what} has the expression {pattern[:200]!r}, which can take {how} steps in a "
                "text of n characters; write it without repetitions that can share a text between "
                "them",
                file=file,
            )


def _patterns(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        if isinstance(found.get("Regex"), str):
            yield found["Regex"]
        found = list(found.values())
    if isinstance(found, list):
        for inner in found:
            yield from _patterns(inner)


def degree(pattern: str) -> float:
    """d of the n^d steps that one place of a text can take; infinite also for what is not
    understood.
    """
    if len(pattern) > _MAX_LENGTH:
        return math.inf
    try:
        part, end = _either(pattern, 0, 0)
    except _TooMuch:
        return math.inf
    return part.steps if end == len(pattern) else math.inf


def _either(text: str, at: int, depth: int) -> tuple[_Part, int]:
    """Alternatives up to the end or to a closing parenthesis."""
    if depth > _MAX_DEPTH:
        raise _TooMuch
    branches = []
    while True:
        parts = []
        while at < len(text) and text[at] not in "|)":
            part, at = _one(text, at, depth)
            parts.append(part)
        branches.append(_row(parts))
        if at >= len(text) or text[at] == ")":
            return _any(branches), at
        at += 1


def _row(parts: Sequence[_Part]) -> _Part:
    """Parts one after another."""
    made = _EMPTY
    for part in reversed(parts):
        # Taken or not taken is no choice where the next character tells.
        told = part.empty and not part.ways and not made.empty and _apart([part, made])
        choices = made.choices + (0 if told and part.choices <= 1 else part.choices)
        first = None if part.first is None else part.first
        if part.empty:
            first = None if None in (first, made.first) else first | made.first  # type: ignore[operator]
        # What comes later fails once for each way that this matches.
        again = part.ways + made.cost if made.fails else 0
        lost = max(part.waste, float(part.eats)) if made.fails else 0
        cost = max(part.cost, again, lost)
        if made.fails and choices > _CHOICES:
            cost = math.inf
        tried = cost if made.fails and (part.choices or part.ways) else 0
        made = _Part(
            ways=part.ways + made.ways,
            cost=cost,
            waste=max(part.waste, made.waste, tried),
            eats=part.eats or made.eats,
            fails=part.fails or made.fails,
            empty=part.empty and made.empty,
            choices=choices,
            first=first,
        )
    return made


def _any(branches: Sequence[_Part]) -> _Part:
    if len(branches) == 1:
        return branches[0]
    firsts = [b.first for b in branches]
    known = frozenset().union(*(f for f in firsts if f is not None))
    return _Part(
        ways=max(b.ways for b in branches),
        cost=max(b.cost for b in branches),
        waste=max(max(b.cost, b.waste) for b in branches),
        eats=any(b.eats for b in branches),
        fails=all(b.fails for b in branches),
        empty=any(b.empty for b in branches),
        choices=_bits(branches),
        first=None if None in firsts else known,
    )


def _bits(branches: Sequence[_Part]) -> float:
    """The choices of one of these."""
    if _apart(branches) and not any(b.empty for b in branches):
        return max(b.choices for b in branches)
    return max(b.choices for b in branches) + math.log2(len(branches))


def _apart(parts: Sequence[_Part]) -> bool:
    """Whether their first characters are known and all different."""
    firsts = [part.first for part in parts if part.first is not None]
    return len(firsts) == len(parts) and len(frozenset().union(*firsts)) == sum(map(len, firsts))


def _one(text: str, at: int, depth: int) -> tuple[_Part, int]:
    """One atom with what repeats it."""
    part, at = _atom(text, at, depth)
    while at < len(text):
        interval = None
        if text[at] in "*+?":
            low, high = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[text[at]]
            at += 1
        elif (interval := _INTERVAL.match(text, at)) and (interval[1] or interval[3]):
            low = int(interval[1] or 0)
            high = low if not interval[2] else int(interval[3]) if interval[3] else math.inf
            at = interval.end()
        else:
            break
        if high < low:
            raise _TooMuch
        part = _repeated(part, low, high)
        # Behind {n} a question mark is a repetition of its own; else it asks for the fewest.
        if text.startswith("?", at) and not (interval and not interval[2]):
            at += 1
        elif text.startswith("+", at) and interval is None:
            at, part = at + 1, replace(part, ways=0, choices=0)
    return part, at


def _repeated(part: _Part, low: int, high: float) -> _Part:
    # The first of several can match, in all their ways, and the last fail.
    before = max(_ways(part, low - 1), float(part.eats)) if low > 1 and part.fails else 0
    each = (1 if high > _FEW else 0) + part.waste if part.waste else 0
    return _Part(
        ways=_ways(part, high),
        cost=part.cost + before,
        waste=max(each, part.cost + before),
        eats=part.eats or high > _FEW,
        fails=part.fails and low > 0,
        empty=part.empty or low == 0,
        # Of an unbounded one the ways tell of how often it matched.
        choices=float(low != high)
        if high > _FEW
        else part.choices * high + math.log2(high - low + 1),
        first=part.first,
    )


def _ways(part: _Part, times: float) -> float:
    """Of up to so many of `part` in a row."""
    if times > _FEW:
        return math.inf if part.choices or part.ways or part.empty else 1
    return part.ways * times if part.choices * times <= _CHOICES else math.inf


def _atom(text: str, at: int, depth: int) -> tuple[_Part, int]:
    char = text[at]
    if char == "(":
        return _group(text, at, depth)
    if char == "[":
        return _Part(), _class_end(text, at)
    if char in "^$":
        return _Part(empty=True, first=frozenset()), at + 1
    if char == "\\":
        found = _ESCAPE.match(text, at)
        if found is None or found[0][1] in _UNBOUNDED:
            raise _TooMuch
        kind = found[0][1]
        if kind in _ANCHORS:
            return _Part(empty=True, first=frozenset()), found.end()
        letter = {"r": "\r", "n": "\n", "t": "\t"}.get(kind, None if kind.isalnum() else kind)
        return _Part(first=_begins(letter)), found.end()
    return _Part(first=None if char == "." else _begins(char)), at + 1


def _begins(char: str | None) -> frozenset[str] | None:
    # Two letters of ASCII are one without case; others are not told apart.
    return frozenset(char.lower()) if char is not None and char.isascii() else None


def _group(text: str, at: int, depth: int) -> tuple[_Part, int]:
    opened = _GROUP.match(text, at)
    if opened is None or text[opened.end() :].startswith("?"):
        raise _TooMuch
    around, atomic, _, options_end = opened.groups()
    if options_end == ")":
        # (?i) to the end of the group it stands in.
        return _either(text, opened.end(), depth + 1)
    part, end = _either(text, opened.end(), depth + 1)
    if end >= len(text):
        raise _TooMuch
    if around:
        # What looks back and has no bound begins at every place before.
        steps = part.steps + (part.eats and around.startswith("<"))
        part = _Part(cost=steps, waste=steps, empty=True, first=frozenset())
    elif atomic:
        part = replace(part, ways=0, choices=0)
    return part, end + 1


def _class_end(text: str, at: int) -> int:
    """Behind a bracketed class, which may hold others."""
    depth, place = 0, at
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == "[":
            depth += 1
            place += text.startswith("^", place + 1)
            # A bracket that closes nothing is a character.
            place += text.startswith("]", place + 1)
        elif text[place] == "]":
            depth -= 1
            if not depth:
                return place + 1
        place += 1
    raise _TooMuch
