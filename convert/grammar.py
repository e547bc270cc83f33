"""Which tokens may come next so that a text keeps to a constraint, through xgrammar."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import ArgumentError
from .constraint import Constraint
from .tokenizer import Tokenizer

# What compiled grammars of one tokenizer may take.
_CACHE_BYTES = 64 << 20
# At one place in JSON: a model that writes nothing but spaces ends at last.
SPACES = 32
State = Any  # an xgrammar.GrammarMatcher: what may follow one answer


class Grammar:
    """A constraint over the tokens of one tokenizer: which may follow an answer.

    vocab: how many ids the model has. eos_ids: the tokens that may end an answer, where it is
    whole. Other special tokens never come. Raises ArgumentError for a constraint that cannot be
    read, a tokenizer that is missing, and without the extra.
    """

    def __init__(
        self, constraint: Constraint, tokenizer: Any, vocab: int, eos_ids: Sequence[int]
    ) -> None:
        if not isinstance(tokenizer, Tokenizer):
            raise ArgumentError("a constraint needs the tokenizer: this model carries none")
        if not eos_ids:
            raise ArgumentError("a constraint needs eos_token_id: an answer ends when it is whole")
        self.vocab, self._ends = vocab, frozenset(eos_ids)
        self._library = _library()
        compiler = _compiler(tokenizer, vocab, tuple(sorted(self._ends)))
        self._compiled = compiled(compiler, constraint)
        banned = [i for i in tokenizer.all_special_ids if i not in self._ends and i < vocab]
        self._banned = torch.tensor(banned, dtype=torch.int64)

    def begin(self) -> State:
        """Before the first token."""
        return self._library.GrammarMatcher(self._compiled)

    def after(self, state: State, token: int) -> State | None:
        """The state one token on; None where that token may not follow."""
        state = state.fork()
        return state if not state.is_terminated() and state.accept_token(token) else None

    def allowed(self, state: State) -> torch.Tensor:
        """Whether each token may follow: bool [vocab], on the host."""
        words = self._library.allocate_token_bitmask(1, self.vocab)
        state.fill_next_token_bitmask(words)
        bits = words[0, :, None] >> torch.arange(32, dtype=torch.int32) & 1
        allowed: torch.Tensor = bits.flatten()[: self.vocab].bool()
        return allowed.index_fill(0, self._banned, False)


def compiled(compiler: Any, constraint: Constraint) -> Any:
    """The constraint as xgrammar's compiled grammar; raises ArgumentError where it is none."""
    try:
        if constraint.json is not None:
            return compiler.compile_json_schema(constraint.json, max_whitespace_cnt=SPACES)
        if constraint.json_object:
            return compiler.compile_json_schema('{"type": "object"}', max_whitespace_cnt=SPACES)
        if constraint.pattern is not None:
            return compiler.compile_regex(constraint.pattern)
        return compiler.compile_grammar(constraint.grammar)
    except (RuntimeError, ValueError) as problem:
        said = str(problem).strip().splitlines() or [""]
        raise ArgumentError(f"the constraint cannot be read: {said[-1]:.300}") from None


class Follower:
    """The state of answers that grow by a token now and then, and are dropped, or kept twice."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._last: dict[tuple[int, ...], State | None] = {(): grammar.begin()}
        self._next: dict[tuple[int, ...], State | None] = {}

    def allowed(self, answer: Sequence[int]) -> torch.Tensor | None:
        """What may follow: bool [vocab]; None where the answer has ended or left the grammar."""
        state = self._state(tuple(answer))
        if state is None or state.is_terminated():
            return None
        return self.grammar.allowed(state)

    def turn(self) -> None:
        """All answers of a step were asked about: those before them are forgotten."""
        self._last, self._next = self._next, {}

    def _state(self, answer: tuple[int, ...]) -> State | None:
        for known in (self._next, self._last):
            if answer in known:
                self._next[answer] = known[answer]
                return known[answer]
        at = len(answer) - 1
        while answer[:at] not in self._last and at:
            at -= 1
        state = self._last[answer[:at]] if answer[:at] in self._last else self.grammar.begin()
        for token in answer[at:]:
            if state is None:
                break
            state = self.grammar.after(state, token)
        self._next[answer] = state
        return state


_lock = threading.Lock()
_kept: WeakKeyDictionary[Tokenizer, dict[Any, Any]] = WeakKeyDictionary()


def _compiler(tokenizer: Tokenizer, vocab: int, eos_ids: tuple[int, ...]) -> Any:
    """The tokenizer's compiler, which keeps what it compiled."""
    with _lock:
        kept = _kept.setdefault(tokenizer, {})
        if (vocab, eos_ids) not in kept:
            kept[vocab, eos_ids] = compiler_of(tokens_of(tokenizer, vocab, eos_ids))
        return kept[vocab, eos_ids]


def compiler_of(tokens: Any) -> Any:
    """A compiler for the tokens of a xgrammar.TokenizerInfo."""
    return _library().GrammarCompiler(tokens, max_threads=4, cache_limit_bytes=_CACHE_BYTES)


def tokens_of(tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> Any:
    """A tokenizer's tokens as a xgrammar.TokenizerInfo; raises ArgumentError without the extra."""
    library = _library()
    known = {i: text for text, i in tokenizer.get_vocab().items()}
    kind, prefix = _written(json.loads(tokenizer.to_json()))
    return library.TokenizerInfo(
        [known.get(i, "") for i in range(vocab)],
        getattr(library.VocabType, kind),
        vocab_size=vocab,
        stop_token_ids=list(eos_ids),
        add_prefix_space=prefix,
    )


def _written(content: dict[str, Any]) -> tuple[str, bool]:
    """How a tokenizer.json's tokens write bytes, by xgrammar's names, and whether a text's first
    token begins with a space that the text has not."""

    def parts(value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, dict):
            return []
        inner = value.get("decoders") or value.get("normalizers") or value.get("pretokenizers")
        return [value, *(p for one in inner or () for p in parts(one))]

    decoders = {part.get("type") for part in parts(content.get("decoder"))}
    makers = [*parts(content.get("normalizer")), *parts(content.get("pre_tokenizer"))]
    prefix = any(
        (part.get("type") == "Prepend" and part.get("prepend") == "▁")
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        or (part.get("type") == "ByteLevel" and part.get("add_prefix_space") is True)
        for part in makers
    )
    if "ByteLevel" in decoders:
        return "BYTE_LEVEL", prefix
    return ("BYTE_FALLBACK" if decoders & {"ByteFallback", "Metaspace"} else "RAW"), prefix


def _library() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise ArgumentError(
            "a constraint needs an extra: pip install 'purelm[constrained]'"
        ) from None
    return xgrammar
