"""Which of a vocabulary's tokens are special, and what each is for, out of tokenizer_config.json.

The rules are those of transformers 5 (`PreTrainedTokenizerBase.__init__`, `_from_pretrained`), so
that the same files give the same tokens with the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import TokenizerError

NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass
class SpecialTokens:
    """Named tokens in their order (model-specific ones such as image_token at the end), and more.

    `extra` are special without a name. `listed` is the config's added_tokens_decoder.
    """

    named: dict[str, tokenizers.AddedToken]
    extra: list[tokenizers.AddedToken] = field(default_factory=list)
    listed: dict[int, tokenizers.AddedToken] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tokenizers.AddedToken]:
        yield from self.named.values()
        yield from self.extra

    def texts(self) -> list[str]:
        """The special tokens' texts, each once."""
        return list(dict.fromkeys(token.content for token in self))


def read(config: Mapping[str, Any], file: Path | None = None) -> SpecialTokens:
    """The special tokens a config names; raises `TokenizerError` for any of another type."""
    listed_raw = config.get("added_tokens_decoder") or {}
    if not isinstance(listed_raw, dict):
        raise TokenizerError("added_tokens_decoder must be an object", file=file)
    listed = {
        _index(index, file): added(token, f"added_tokens_decoder[{index}]", file)
        for index, token in listed_raw.items()
    }
    by_text = {token.content: token for token in listed.values()}

    def named(name: str, value: Any) -> tokenizers.AddedToken:
        token = added(value, name, file)
        return by_text.get(token.content, token)

    extra = config.get("extra_special_tokens") or None
    if config.get("additional_special_tokens") and not isinstance(extra, list):
        unnamed = config["additional_special_tokens"]
    else:
        unnamed = extra if isinstance(extra, list) else []
    if extra is not None and not isinstance(extra, dict | list):
        raise TokenizerError("extra_special_tokens must be a list or an object", file=file)
    if not isinstance(unnamed, list):
        raise TokenizerError("additional_special_tokens must be a list", file=file)

    found = {name: named(name, config[name]) for name in config if name in NAMED and config[name]}
    # The order in which transformers lists (and, where they are new, adds) them.
    found = {name: found[name] for name in NAMED if name in found}
    for name, value in config.items():
        if name.endswith("_token") and name not in NAMED and (_is_token(value) and value):
            found[name] = named(name, value)
    if isinstance(extra, dict):
        found |= {name: named(name, value) for name, value in extra.items()}
    return SpecialTokens(
        found, [added(token, "additional_special_tokens", file) for token in unnamed], listed
    )


def _index(text: str, file: Path | None) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise TokenizerError(f"added_tokens_decoder has the id {text[:40]!r}", file=file)
    return int(text)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and value.get("__type") == "AddedToken"
    )


def added(value: Any, where: str, file: object = None) -> tokenizers.AddedToken:
    """The token a config writes as a string or an object (`__type: AddedToken` or not)."""
    if isinstance(value, tokenizers.AddedToken):
        return value
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(
            f"{where} must be a string or an object with 'content', found {str(value)[:100]}",
            file=file,
        )
    flags = {}
    for name in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        if name in value:
            if not isinstance(value[name], bool):
                raise TokenizerError(f"{where}: {name} must be true or false", file=file)
            flags[name] = value[name]
    return tokenizers.AddedToken(value["content"], **flags)


def install(backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Adds to `backend`, in place, the tokens it lacks, in the order transformers adds them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [special.listed[index] for index in sorted(special.listed)]
    seen = known | {token.content for token in new}
    for token in special:
        if token.content not in seen:
            seen.add(token.content)
            new.append(token)
    names = {token.content for token in special.named.values()}
    for token in new:
        if token.content in names and not token.special:
            token.special = True
    if new:
        backend.add_tokens(new)
