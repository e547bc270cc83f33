"""The tokens of a tokenizer, their ids, and which of them are special for what.

The half of the tokenizer's interface that knows nothing of text; the names are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import tokenizers

from ..errors import ArgumentError
from .special_tokens import NAMED, SpecialTokens, added


def _named(name: str) -> Any:
    def get(self: Vocabulary) -> str | None:
        return self._text_of(name)

    def put(self: Vocabulary, value: str | tokenizers.AddedToken | None) -> None:
        self._name_token(name, value)

    return property(get, put, doc=f"The text of the {name}, or None.")


def _named_id(name: str) -> Any:
    def get(self: Vocabulary) -> int | None:
        return self._id_of(name)

    def put(self: Vocabulary, value: int | None) -> None:
        self._name_token(name, None if value is None else self._token_at(value))

    return property(get, put, doc=f"The id of the {name}, or None.")


class Vocabulary:
    """Tokens and ids over a `tokenizers.Tokenizer`; setters and `add_*` change it in place."""

    bos_token, bos_token_id = _named("bos_token"), _named_id("bos_token")
    eos_token, eos_token_id = _named("eos_token"), _named_id("eos_token")
    unk_token, unk_token_id = _named("unk_token"), _named_id("unk_token")
    sep_token, sep_token_id = _named("sep_token"), _named_id("sep_token")
    pad_token, pad_token_id = _named("pad_token"), _named_id("pad_token")
    cls_token, cls_token_id = _named("cls_token"), _named_id("cls_token")
    mask_token, mask_token_id = _named("mask_token"), _named_id("mask_token")

    SPECIAL_TOKENS_ATTRIBUTES = NAMED

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        self._backend = backend
        self._special = special

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        return self._backend

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones; `len()` counts all."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        found = self._backend.get_added_tokens_decoder()
        return {index: found[index] for index in sorted(found)}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or the ids of several; for an unknown one the unk token's, or None."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._backend.token_to_id(tokens)
        return index if index is not None else self.unk_token_id

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or those of several; None for an id outside the vocabulary."""
        if isinstance(ids, int):
            return self._backend.id_to_token(natural(ids))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        numbers = [int(index) for index in ids]
        return [self._backend.id_to_token(natural(n)) for n in numbers if n not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens at the end of the vocabulary, in place; how many were new."""
        many = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        for token in many:
            if not isinstance(token, str | tokenizers.AddedToken) or not str(token):
                raise ArgumentError(f"a token must be a string that is not empty, found {token!r}")
        add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
        return int(add(list(many)))

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Names special tokens ({"pad_token": "<pad>"}), in place, and adds those that are new.

        `extra_special_tokens` (or `additional_special_tokens`) takes a list. How many were new.
        """
        named: dict[str, tokenizers.AddedToken] = {}
        extra = list(self._special.extra)
        new: list[tokenizers.AddedToken] = []
        for key, value in special_tokens_dict.items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                if not isinstance(value, list | tuple):
                    raise ArgumentError(f"{key} takes a list of tokens, found {value!r}")
                tokens = [_special(token, key) for token in value]
                known = {token.content for token in extra}
                new += tokens
                if replace_extra_special_tokens:
                    extra = tokens or extra
                else:
                    extra += [token for token in tokens if token.content not in known]
            elif key in NAMED:
                named[key] = _special(value, key)
                new.append(named[key])
            else:
                raise ArgumentError(f"{key!r} is no special token; expected one of {list(NAMED)}")
        count = self.add_tokens(new, special_tokens=True) if new else 0
        self._special.named.update(named)
        self._special.extra = extra
        return count

    def _text_of(self, name: str) -> str | None:
        token = self._special.named.get(name)
        return None if token is None else str(token.content)

    def _id_of(self, name: str) -> int | None:
        text = self._text_of(name)
        return None if text is None else self._backend.token_to_id(text)

    def _token_at(self, index: int) -> str:
        token = self._backend.id_to_token(natural(index))
        if token is None:
            raise ArgumentError(f"no token has the id {index}; the vocabulary has {len(self)}")
        return str(token)

    def _name_token(self, name: str, value: str | tokenizers.AddedToken | None) -> None:
        if value is None:
            self._special.named.pop(name, None)
            return
        if not isinstance(value, str | tokenizers.AddedToken):
            raise ArgumentError(f"{name} takes a token's text or None, found {value!r}")
        if self._backend.token_to_id(str(value)) is None:
            raise ArgumentError(
                f"{name}: the vocabulary has no token {str(value)!r}; "
                f"add_special_tokens({{{name!r}: ...}}) adds it"
            )
        self._special.named[name] = _special(value, name)

    def __getattr__(self, name: str) -> Any:
        # Model-specific special tokens, such as image_token and image_token_id.
        special = self.__dict__.get("_special")
        if special is not None and name in special.named:
            return self._text_of(name)
        if special is not None and name.endswith("_id") and name[:-3] in special.named:
            return self._id_of(name[:-3])
        raise AttributeError(f"the tokenizer has no attribute {name!r}")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens' texts."""
        order = [*NAMED, *(name for name in self._special.named if name not in NAMED)]
        named = self._special.named
        return {name: named[name].content for name in order if name in named}

    @property
    def extra_special_tokens(self) -> list[str]:
        return [token.content for token in self._special.extra]

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[str]) -> None:
        self._special.extra = [_special(token, "extra_special_tokens") for token in tokens]

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        return cast("list[int]", self.convert_tokens_to_ids(self.extra_special_tokens))

    additional_special_tokens = extra_special_tokens
    additional_special_tokens_ids = extra_special_tokens_ids

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return cast("list[int]", self.convert_tokens_to_ids(self.all_special_tokens))

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each id that is a special token, else 0 (the ids as they are, nothing is added)."""
        if not already_has_special_tokens or token_ids_1 is not None:
            raise ArgumentError("expected one row of ids with already_has_special_tokens=True")
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    @property
    def add_bos_token(self) -> bool:
        """Whether tokenizing puts the bos token in front; tokenizer.json decides it."""
        bos, ids = self._id_of("bos_token"), self._backend.encode("a").ids
        return bos is not None and ids[:1] == [bos]

    @property
    def add_eos_token(self) -> bool:
        """Whether tokenizing puts the eos token behind; tokenizer.json decides it."""
        eos, ids = self._id_of("eos_token"), self._backend.encode("a").ids
        return eos is not None and ids[-1:] == [eos]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return int(self._backend.num_special_tokens_to_add(pair))


def natural(index: int) -> int:
    """`index`, which must be an id that fits 32 bits; raises `ArgumentError`."""
    if not 0 <= index < 1 << 32:
        raise ArgumentError(f"{index} cannot be a token's id")
    return index


def _special(token: Any, name: str) -> tokenizers.AddedToken:
    if not isinstance(token, str | tokenizers.AddedToken) or not str(token):
        raise ArgumentError(f"{name}: a token must be a string that is not empty, found {token!r}")
    return added(token, name)
