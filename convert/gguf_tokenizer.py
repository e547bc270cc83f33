"""The tokenizer that a GGUF file carries, made into what a tokenizer.json would give.

`tokenizer.ggml.model` "llama" is a SentencePiece BPE, whose merges follow from its scores, "gpt2" a
byte-level BPE, whose splitting rule `tokenizer.ggml.pre` names.
"""

import json
import math
from collections import Counter
from functools import partial
from typing import Any

import tokenizers

from ..errors import TokenizerError
from .gguf_file import GGUF
from .gguf_splits import SPLITS
from .tokenizer import Tokenizer
from .tokenizer_files import rust
from .tokenizer_parts import BYTE, CONTROL, SPACE, UNKNOWN, USER, spm_merges, with_ends

# Tokens are cut everywhere to find their merges.
_MAX_PIECE = 512
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def read_tokenizer(gguf: GGUF) -> Tokenizer:
    """The tokenizer of the file's metadata, its chat templates included.

    Raises TokenizerError for a kind that is not known and for lists that do not fit each other.
    """
    tokens = _texts(gguf, "tokens")
    kinds = _list(gguf, "token_type", int, len(tokens)) or [1] * len(tokens)
    if len(set(tokens)) != len(tokens):
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise _wrong(gguf, f"tokens occur twice: {str(twice)[:100]}")
    model = gguf.fields.get("tokenizer.ggml.model")
    if model == "llama":
        made = _sentencepiece(gguf, tokens, kinds)
    elif model == "gpt2":
        made = _byte_level(gguf, tokens)
    else:
        raise _wrong(gguf, f"the tokenizer {model!r:.60} is not read; known are llama and gpt2")
    made["added_tokens"] = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER,
        }
        for index, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, hf in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = gguf.fields.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None:
            config[f"{hf}_token"] = _token(gguf, tokens, name, index)
    made["post_processor"] = _ends(gguf, made["post_processor"], tokens, model)
    text = json.dumps({"version": "1.0", "truncation": None, "padding": None, **made})
    backend = rust(
        lambda: tokenizers.Tokenizer.from_str(text),
        "the tokenizer cannot be made",
        partial(TokenizerError, file=gguf.file),
    )
    return Tokenizer(
        backend,
        config,
        chat_template=_templates(gguf),
        name_or_path=str(gguf.file),
        file=gguf.file,
    )


def _sentencepiece(gguf: GGUF, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    scores = _list(gguf, "scores", float, len(tokens))
    if scores is None or not all(math.isfinite(score) for score in scores):
        raise _wrong(gguf, "the tokenizer has no scores, or some that are not finite")
    if gguf.fields.get("tokenizer.ggml.remove_extra_whitespaces", False):
        raise _wrong(gguf, "the tokenizer removes whitespace, which is not supported")
    if any(len(token) > _MAX_PIECE for token in tokens):
        raise _wrong(gguf, f"a token is longer than {_MAX_PIECE} characters")
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    prefix = gguf.fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    before: list[Any] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": BYTE in kinds,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": spm_merges(tokens, kinds, scores),
        },
    }


def _byte_level(gguf: GGUF, tokens: list[str]) -> dict[str, Any]:
    merges = []
    for merge in _texts(gguf, "merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise _wrong(gguf, f"the merge {merge!r:.60} is not two tokens")
        merges.append([left, right])
    pre = gguf.fields.get("tokenizer.ggml.pre", "default")
    rule = SPLITS.get(pre) if isinstance(pre, str) else None
    if rule is None:
        known = ", ".join(SPLITS)
        raise _wrong(gguf, f"how {pre!r:.60} splits text is not known; known are {known}")
    return {
        "normalizer": rule.normalizer,
        "pre_tokenizer": rule.pre_tokenizer,
        "post_processor": {**_LEVEL, "use_regex": True},
        "decoder": {**_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": rule.ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _ends(gguf: GGUF, inner: Any, tokens: list[str], model: str) -> Any:
    """The post processor that adds the first and the last token, as the file says."""
    pre = str(gguf.fields.get("tokenizer.ggml.pre"))
    default = model == "llama" or (pre in SPLITS and SPLITS[pre].bos)
    pieces = []
    for name, added in (("bos", default), ("eos", False)):
        index = gguf.fields.get(f"tokenizer.ggml.{name}_token_id")
        asked = gguf.fields.get(f"tokenizer.ggml.add_{name}_token", added)
        if asked and index is not None:
            pieces.append((name, _token(gguf, tokens, name, index), index))
    return with_ends(inner, pieces)


def _templates(gguf: GGUF) -> str | dict[str, str] | None:
    start = "tokenizer.chat_template"
    found = {
        name.removeprefix(start).removeprefix(".") or "default": value
        for name, value in gguf.fields.items()
        if name == start or name.startswith(f"{start}.")
    }
    if not all(isinstance(value, str) and len(value) < 1 << 18 for value in found.values()):
        raise _wrong(gguf, f"{start} is no text, or too long")
    return found["default"] if set(found) == {"default"} else found or None


def _token(gguf: GGUF, tokens: list[str], name: str, index: Any) -> str:
    if type(index) is not int or not 0 <= index < len(tokens):
        raise _wrong(gguf, f"{name}_token_id is {index!r:.60} of {len(tokens)} tokens")
    return tokens[index]


def _texts(gguf: GGUF, name: str) -> list[str]:
    found = _list(gguf, name, str, None)
    if not found:
        raise _wrong(gguf, f"the file has no tokenizer.ggml.{name}; give a folder with a tokenizer")
    return found


def _list(gguf: GGUF, name: str, kind: type, length: int | None) -> list[Any] | None:
    found = gguf.fields.get(f"tokenizer.ggml.{name}")
    if found is None:
        return None
    if not isinstance(found, list) or not all(type(value) is kind for value in found):
        raise _wrong(gguf, f"tokenizer.ggml.{name} should be a list of {kind.__name__}")
    if length is not None and len(found) != length:
        raise _wrong(gguf, f"tokenizer.ggml.{name} has {len(found)} entries for {length} tokens")
    return found


def _wrong(gguf: GGUF, message: str) -> TokenizerError:
    return TokenizerError(message, file=gguf.file)
