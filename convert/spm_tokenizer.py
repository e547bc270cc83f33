"""A SentencePiece model made into what a tokenizer.json would give.

It is set up as transformers sets up such a one. Its space goes before the text, unless that begins
with one, and not after each special token, unless `legacy` is true; models that squeeze spaces put
it everywhere. First and last token are added where tokenizer_config.json says so.
"""

import base64
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import TokenizerError
from .json_file import read_json
from .spm_file import BPE, NAME, Pieces, read_pieces
from .tokenizer_files import TOKENIZER, rust
from .tokenizer_parts import BYTE, CONTROL, SPACE, UNKNOWN, USER, spm_merges, with_ends

ADDED = "added_tokens.json"


def is_needed(folder: Path) -> bool:
    """Whether the folder has a SentencePiece model and no tokenizer.json."""
    return os.path.lexists(folder / NAME) and not os.path.lexists(folder / TOKENIZER)


def backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of the folder's `tokenizer.model`, with the tokens added in other files.

    config: tokenizer_config.json. Raises TokenizerError.
    """
    pieces = read_pieces(folder)
    added = _added(folder, config, pieces)
    ids = {piece: index for index, piece in enumerate(pieces.pieces)} | {
        token["content"]: token["id"] for token in added
    }
    ends = []
    for name in ("bos", "eos"):
        token = _text(config.get(f"{name}_token"))
        if token is not None and token in ids and config.get(f"add_{name}_token"):
            ends.append((name, token, ids[token]))
    prefix = config.get("add_prefix_space")
    prefix = pieces.prefix if prefix is None else bool(prefix)
    text = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            **_model(pieces, prefix, bool(config.get("legacy", False))),
            "post_processor": with_ends(None, ends),
        }
    )
    return rust(
        lambda: tokenizers.Tokenizer.from_str(text),
        "the tokenizer cannot be made",
        partial(TokenizerError, file=folder / NAME),
    )


def _model(pieces: Pieces, prefix: bool, legacy: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if pieces.charsmap:
        rules = base64.b64encode(pieces.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": rules})
    if pieces.squeeze:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        if prefix:  # Metaspace would not put it where a space was taken away
            steps.append({"type": "Prepend", "prepend": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    scheme = ("always" if legacy else "first") if prefix and not pieces.squeeze else "never"
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": scheme,
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(pieces) if pieces.kind == BPE else _unigram(pieces),
    }


def _bpe(pieces: Pieces) -> dict[str, Any]:
    tokens, kinds, scores = list(pieces.pieces), list(pieces.kinds), list(pieces.scores)
    return {
        "type": "BPE",
        "unk_token": tokens[pieces.unknown],
        "fuse_unk": True,
        "byte_fallback": BYTE in kinds,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": spm_merges(tokens, kinds, scores),
    }


def _unigram(pieces: Pieces) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": pieces.unknown,
        "byte_fallback": BYTE in pieces.kinds,
        "vocab": list(zip(pieces.pieces, pieces.scores, strict=True)),
    }


def _added(folder: Path, config: Mapping[str, Any], pieces: Pieces) -> list[dict[str, Any]]:
    """Pieces that are no text, and tokens of `added_tokens_decoder` and added_tokens.json."""
    found: dict[int, dict[str, Any]] = {
        index: _token(index, pieces.pieces[index], special=kind != USER)
        for index, kind in enumerate(pieces.kinds)
        if kind in (UNKNOWN, CONTROL, USER)
    }
    if (folder / ADDED).is_file():
        for content, index in read_json(folder / ADDED, error=TokenizerError).items():
            if type(index) is not int or index < 0:
                raise TokenizerError(f"{content[:60]!r} is not a number", file=folder / ADDED)
            found[index] = _token(index, content, special=True)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError("added_tokens_decoder should be an object", file=folder / NAME)
    for key, fields in decoder.items():
        text = _text(fields)
        if text is None or not str(key).isdecimal():
            raise TokenizerError(f"added_tokens_decoder[{key!r:.40}] is no token", file=folder)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        index = int(key)
        found[index] = _token(index, text, special=False) | {
            name: bool(fields[name]) for name in flags if name in fields
        }
    return [found[index] for index in sorted(found)]


def _token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **no, "special": special}


def _text(token: Any) -> str | None:
    """A token's text, as the files have it: plain, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
