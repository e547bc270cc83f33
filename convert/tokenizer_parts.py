"""Parts of a tokenizer.json, for vocabularies that come without one (GGUF, SentencePiece)."""

from collections.abc import Sequence
from typing import Any

# SentencePiece's kinds of pieces, and what it writes for a space.
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"


def spm_merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to join two tokens into a third, the one with the best score first."""
    ids = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (NORMAL, USER)
    }
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right))
    return [[tokens[left], tokens[right]] for _, left, right in sorted(found)]


def with_ends(inner: Any, pieces: Sequence[tuple[str, str, int]]) -> Any:
    """The post processor `inner`, after which `pieces` are added: ("bos" or "eos", token, id)."""
    if not pieces:
        return inner

    def row(letter: str, type_id: int) -> list[Any]:
        def special(wanted: str) -> list[Any]:
            return [
                {"SpecialToken": {"id": t, "type_id": type_id}} for n, t, _ in pieces if n == wanted
            ]

        return [
            *special("bos"),
            {"Sequence": {"id": letter, "type_id": type_id}},
            *special("eos"),
        ]

    template = {
        "type": "TemplateProcessing",
        "single": row("A", 0),
        "pair": [*row("A", 0), *row("B", 1)],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for _, t, i in pieces},
    }
    return template if inner is None else {"type": "Sequence", "processors": [inner, template]}
