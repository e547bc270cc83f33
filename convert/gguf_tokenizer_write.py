"""A tokenizer as the metadata of a GGUF file, the other way of `gguf_tokenizer`.

llama.cpp has its own tokenizers, which know a byte-level BPE by the name of its splitting rule, and
a SentencePiece BPE by the scores of its tokens. What they cannot express is refused.
"""

import json
import warnings
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from tokenizers import models

from ..errors import TokenizerError
from .gguf_file import GGUF
from .gguf_splits import SPLITS, described, name_of, steps
from .gguf_tokenizer import read_tokenizer
from .tokenizer import Tokenizer
from .tokenizer_parts import BYTE, CONTROL, SPACE, UNKNOWN, USER, spm_merges

_PLAIN, _UNUSED = 1, 5
_PROBES = (
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces\n\n\ttab \r\n trailing   ",
    "\u00dcn\u00efc\u00f6d\u00e9 e\u0301 \u65e5\u672c\u8a9e \u0645\u0631\u062d \U0001f642",
    "123456 3.14 don't DON'T I'll (x**2)!= {'a': [1,2]} # https://example.com/?q=1",
    "\u0000\u007f\u00ad\u200b\ufeff",
    *("a" + character * length + "b" for character in " \n\t" for length in (3, 8, 31, 33, 70)),
    "a",
    "",
)
# Names of special ids, in the file and of the tokenizer's attributes.
_IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def tokenizer_fields(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The `tokenizer.…` fields of a model with `size` embeddings; ids without a token are unused.

    Raises TokenizerError for a tokenizer that is no BPE, splits or normalises text in a way that
    has no name there, has merges that scores cannot express, or has more tokens than `size`; an
    added token beyond it, which the model could not be given, is left out with a warning.
    """
    made = json.loads(tokenizer.to_json())
    model = made["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(
            f"a tokenizer of the kind {model.get('type')!r:.40} cannot be put into a GGUF file; "
            "only BPE can (byte-level, or SentencePiece's with byte fallback)"
        )
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    tokens, kinds = _tokens(made, size)
    if _has_bytes(made):
        kind = "gpt2"
        fields: dict[str, Any] = {
            "pre": _splitting(made),
            "merges": [" ".join(merge) for merge in merges],
        }
    else:
        kind = "llama"
        fields = {
            "pre": "default",
            "scores": _scores(tokens, kinds, merges),
            "add_space_prefix": _prefix(made),
        }
    fields = {"model": kind, "tokens": tokens, "token_type": kinds, **fields}
    for name, attribute in _IDS.items():
        index = getattr(tokenizer, f"{attribute}_token_id")
        if index is not None:
            fields[f"{name}_token_id"] = index
    fields |= _ends(tokenizer)
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, text in (templates or {}).items():
        end = "" if name == "default" else f".{name}"
        named[f"tokenizer.chat_template{end}"] = text
    return named


def check_tokenizer(written: GGUF, tokenizer: Tokenizer) -> None:
    """Raise TokenizerError unless the file's tokenizer gives the ids of `tokenizer`.

    Over texts of several scripts and, but for a tokenizer that puts a space before a text's very
    first word only, which llama.cpp cannot do (a warning says so), around its special tokens.
    """
    found = read_tokenizer(written)
    texts = list(_PROBES)
    made = json.loads(tokenizer.to_json())
    if any(step.get("prepend_scheme") == "first" for step in steps(made["pre_tokenizer"])):
        warnings.warn(
            "the tokenizer puts a space before the first word of a text; llama.cpp puts one after "
            "each special token too",
            stacklevel=2,
        )
    else:
        size = len(written.fields["tokenizer.ggml.tokens"])
        added = [token for token in made["added_tokens"] if token["id"] < size]
        texts += [f"a {token['content']}b" for token in added[:64]]
    for text in texts:
        for special in (True, False):
            want = tokenizer(text, add_special_tokens=special)["input_ids"]
            ids = found(text, add_special_tokens=special)["input_ids"]
            if ids != want:
                raise TokenizerError(
                    f"a GGUF file cannot express this tokenizer: {text!r:.80} would become "
                    f"{str(ids)[:120]} instead of {str(want)[:120]}"
                )


def _tokens(made: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    model = made["model"]
    found = {index: (token, _PLAIN) for token, index in model["vocab"].items()}
    if found and max(found) >= size:
        raise TokenizerError(
            f"the tokenizer has ids up to {max(found)}, the model {size} embeddings; resize the "
            "model, or give its own tokenizer"
        )
    if model.get("byte_fallback"):
        for byte in range(256):
            token = f"<0x{byte:02X}>"
            if token in model["vocab"]:
                found[model["vocab"][token]] = token, BYTE
    for added in made["added_tokens"]:
        if added["id"] >= size:
            warnings.warn(
                f"the token {added['content']!r:.60} has the id {added['id']}, for which the model "
                f"has no embedding ({size} of them): it is no token of the GGUF file",
                stacklevel=2,
            )
            continue
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise TokenizerError(
                f"the token {added['content']!r:.60} takes the spaces beside it or whole words "
                "only, which a GGUF file cannot say"
            )
        found[added["id"]] = added["content"], CONTROL if added["special"] else USER
    if not _has_bytes(made) and model.get("unk_token") in model["vocab"]:
        found[model["vocab"][model["unk_token"]]] = model["unk_token"], UNKNOWN
    pairs = [found.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(size)]
    return [token for token, _ in pairs], [kind for _, kind in pairs]


def _has_bytes(made: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps(made["pre_tokenizer"]))


def _splitting(made: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text."""
    model, parts = made["model"], (made["normalizer"], made["pre_tokenizer"])
    whole = bool(model.get("ignore_merges"))
    pre = name_of(*parts, whole)
    if pre is None:
        raise TokenizerError(
            f"how the tokenizer splits text has no name in a GGUF file; known are "
            f"{', '.join(SPLITS)}, found {described(*parts)}"
        )
    if SPLITS[pre].ignore_merges != whole and not _all_are_made(model):
        raise TokenizerError(
            f"a GGUF file's {pre!r} {'joins' if whole else 'does not join'} parts of a word that "
            "is a token, and this tokenizer has tokens of which that would not give the same"
        )
    return pre


def _all_are_made(model: Mapping[str, Any]) -> bool:
    """Whether merges make every token of its characters, so that it is as if taken whole."""
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    bpe = models.BPE(dict(model["vocab"]), merges)
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"])


def _prefix(made: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; raises for other rules than SentencePiece's."""
    found, replaced = [*steps(made["normalizer"]), *steps(made["pre_tokenizer"])], False
    for step in found:
        known = (
            (step["type"] == "Prepend" and step["prepend"] == SPACE)
            or (step["type"] == "Replace" and step["content"] == SPACE)
            or (step["type"] == "Metaspace" and step["replacement"] == SPACE)
            # Gemma's, which finds nothing once spaces are replaced.
            or (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaced)
        )
        replaced = replaced or step["type"] == "Replace"
        if not known:
            raise TokenizerError(
                f"the tokenizer changes text by {json.dumps(step)[:200]}, which a GGUF file cannot "
                "say"
            )
    if not any(step["type"] in ("Replace", "Metaspace") for step in found):
        raise TokenizerError("the tokenizer is neither byte-level nor SentencePiece's kind")
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in found
    )


def _scores(tokens: list[str], kinds: list[int], merges: list[list[str]]) -> list[float]:
    """Scores from which `merges` follow: the token that is made first has the highest."""
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    scores = []
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        usual = kind in (_PLAIN, USER)
        scores.append(-float(rank.get(token, len(rank) + index)) if usual else 0.0)
    # SentencePiece joins any two pieces into a third, in the order of the third's score.
    implied = spm_merges(tokens, kinds, scores)
    if sorted(implied) != sorted(merges) or not _same_order(implied, merges):
        raise TokenizerError(
            "the tokenizer's merges do not follow from scores of its tokens, which is all that a "
            "GGUF file can hold for a tokenizer that is not byte-level"
        )
    return scores


def _same_order(one: list[list[str]], other: list[list[str]]) -> bool:
    """Whether both make tokens in the same order, but for Gemma's runs of one character.

    Its merges of spaces, line feeds or tabs alone come first, longer runs before shorter: whatever
    the order among them, a run that has begun grows from its left end, one by one.
    """
    ours, theirs = ([left + right for left, right in merges] for merges in (one, other))
    front = list(takewhile(lambda product: len(set(product)) == 1, theirs))
    lengths: dict[str, list[int]] = {}
    for product in dict.fromkeys(front):
        lengths.setdefault(product[0], []).append(len(product))
    whole = all(found == list(range(found[0], found[-1] - 1, -1)) for found in lengths.values())
    count = len(front) if whole and sorted(front) == sorted(ours[: len(front)]) else 0
    return ours[count:] == theirs[count:]


def _ends(tokenizer: Tokenizer) -> dict[str, bool]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    bos = ids[:1] == [tokenizer.bos_token_id] and ids != plain
    rest = ids[1:] if bos else ids
    eos = rest[-1:] == [tokenizer.eos_token_id] and rest != plain
    if (rest[:-1] if eos else rest) != plain:
        raise TokenizerError(
            f"the tokenizer puts tokens around a text ({ids} for {plain}) that are neither bos nor "
            "eos, which a GGUF file cannot say"
        )
    return {"add_bos_token": bos, "add_eos_token": eos}
