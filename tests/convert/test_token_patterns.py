"""Expressions of tokenizers' files: which take too long, by counting what matching them takes."""

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from purelm.convert.gguf_splits import SPLITS
from purelm.convert.token_patterns import degree
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import TokenizerError

# An expression as a tree, and how it is written.
Tree = tuple[Any, ...]


def tree(draw: random.Random, depth: int) -> Tree:
    kind = draw.choice(["*", "*", "+", "?", "row", "row", "row", "either", "not"])
    if depth == 0 or draw.random() < 0.25:
        return "char", draw.choice("ab.")
    count = draw.choice([2, 3]) if kind == "row" else 2 if kind == "either" else 1
    return (kind, *[tree(draw, depth - 1) for _ in range(count)])


def written(tree: Tree) -> str:
    kind, *parts = tree
    if kind == "char":
        return str(parts[0])
    texts = [written(part) for part in parts]
    if kind == "either":
        return f"(?:{'|'.join(texts)})"
    if kind == "not":
        return f"(?!{texts[0]})"
    return "".join(texts) if kind == "row" else f"(?:{texts[0]}){kind}"


class Steps:
    """A backtracking matcher that counts, and stops at `most`."""

    def __init__(self, text: str, most: int) -> None:
        self.text, self.most, self.count = text, most, 0

    def ends(self, tree: Tree, at: int) -> Iterator[int]:
        """Where the tree's matches from `at` end, the engine's first choice first."""
        self.count += 1
        if self.count > self.most:
            raise OverflowError
        kind, *parts = tree
        if kind == "char":
            if at < len(self.text) and parts[0] in (self.text[at], "."):
                yield at + 1
        elif kind == "not":
            if next(self.ends(parts[0], at), None) is None:
                yield at
        elif kind == "either":
            for part in parts:
                yield from self.ends(part, at)
        elif kind == "row":
            if len(parts) == 1:
                yield from self.ends(parts[0], at)
                return
            for middle in self.ends(parts[0], at):
                yield from self.ends(("row", *parts[1:]), middle)
        elif kind == "?":
            yield from self.ends(parts[0], at)
            yield at
        else:
            for middle in self.ends(parts[0], at):
                # An engine does not repeat what matched nothing.
                if middle > at:
                    yield from self.ends(("*", parts[0]), middle)
                elif kind == "+":
                    yield middle
            if kind == "*":
                yield at
            elif kind == "+":
                return


def grows(drawn: Tree) -> bool:
    """Whether twice the text takes well over twice the steps, at one place."""
    for make in (lambda n: "a" * n, lambda n: "a" * n + "b", lambda n: "ab" * (n // 2)):
        counts = []
        for n in (24, 48):  # alike by 2, 3 and 4
            matcher = Steps(make(n), 20_000)
            try:
                next(matcher.ends(drawn, 0), None)
            except OverflowError:
                return True
            counts.append(matcher.count)
        if counts[1] > 2.6 * counts[0] + 60:
            return True
    return False


def check(count: int, seed: int) -> tuple[int, int]:
    """How many of `count` drawn expressions are refused, and how many of those grow."""
    draw, refused, growing = random.Random(seed), 0, 0
    for _ in range(count):
        drawn = tree(draw, 3)
        if degree(written(drawn)) <= 1:
            assert not grows(drawn), written(drawn)
        else:
            refused += 1
            growing += grows(drawn)
    return refused, growing


def test_what_is_taken_takes_steps_in_proportion() -> None:
    refused, growing = check(2_000, seed=0)
    assert refused > 100 and growing > 20


@pytest.mark.full
def test_what_is_taken_takes_steps_in_proportion_full() -> None:
    refused, growing = check(100_000, seed=1)
    print(f"of 100,000 expressions {refused} are refused, {growing} of them for a text at hand")
    assert growing > 1_000


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+$", "(a?){99}a{99}", "(.*)*x", "a*a*(?!a)(?!b)", r"(?<n>a)\g<n>*", "(?x)a"],
)
def test_refused_when_opened(pattern: str, tmp_path: Path) -> None:
    file = byte_level(tmp_path) / "tokenizer.json"
    for where in ("pre_tokenizer", "normalizer", "decoder"):
        content = json.loads(file.read_text(encoding="utf-8"))
        step = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
        if where == "pre_tokenizer":
            step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
            step |= {"invert": False}
            content[where] = {"type": "Sequence", "pretokenizers": [step, content[where]]}
        else:
            content[where] = step
        folder = tmp_path / where
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        began = time.thread_time()
        with pytest.raises(TokenizerError, match=f"the {where} has the expression"):
            Tokenizer.from_folder(folder)
        assert time.thread_time() - began < 1


def test_publishers_patterns_are_taken() -> None:
    patterns = {pattern for rule in SPLITS.values() for pattern in rule.patterns}
    assert len(patterns) > 20 and all(degree(pattern) <= 1 for pattern in patterns)


@pytest.mark.parametrize(
    ("pattern", "d"),
    [
        (r"\s+(?!\S)|\s+", 1),
        (r"(?:\r?\n)+x", 1),
        (r"(?:ab|cd)+x", 1),
        ("a++b", 1),
        ("(?>a*)b", 1),
        ("[[:alpha:]&&[^a]]+", 1),
        ("a*(?!.*)", 2),
        ("(?:a*b|a)+", 2),
        (r"(?<=x)\p{Han}{1,3}", 0),
        ("(?:a{2}?a)*b", math.inf),  # {n}? is ({n})?, and {n,m}? as few as will do
        ("(?:a{2,2}?c)*b", 1),
        ("(?:a|.){30}", math.inf),
        ("a?" * 26 + "[cd]", math.inf),
        ("a{0,64}a{0,64}a{0,64}[cd]", math.inf),
        ("(?:(?:aa|aa)?b)*c", math.inf),
        (r"(?<=a.*b)c", 2),
        ("a{5,2}", math.inf),
        ("(?:a?){30}", 0),
        (r"(a*)\1b", math.inf),
        (r"\p{M}*\Xb", math.inf),
        ("(?i:a*)a*b", 2),
        ("(a*)*b", math.inf),
        ("[a", math.inf),
        ("a" * 20_000, math.inf),
        ("(" * 200 + ")" * 200, math.inf),
        ("(?~a)", math.inf),
        ("\\", math.inf),
    ],
)
def test_degrees(pattern: str, d: float) -> None:
    assert degree(pattern) == d


@given(st.text(alphabet="ab()[]{}|*+?\\^$:=!<>,19p-&ix.", max_size=40))
def test_any_text_has_a_degree(pattern: str) -> None:
    assert degree(pattern) >= 0
