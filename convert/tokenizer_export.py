"""A tokenizer as transformers writes and holds it, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from ..errors import ArgumentError
from .special_tokens import NAMED
from .tokenizer import Tokenizer

# What lives in tokenizer.json or in a file of its own, or would have code of a repository run.
_ELSEWHERE = ("chat_template", "added_tokens_decoder", "additional_special_tokens", "auto_map")
_SETTINGS = (
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
)


def config_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json, with every field that the original had.

    The class is always `PreTrainedTokenizerFast`, the one that takes tokenizer.json as it stands;
    others (LlamaTokenizer) rebuild it in transformers 5 and lose its normalizer.
    """
    config = {k: v for k, v in tokenizer.init_kwargs.items() if k not in _ELSEWHERE}
    for name, value in list(config.items()):
        if name.endswith("_token") and not isinstance(value, bool):
            del config[name]
    named = tokenizer.special_tokens_map
    specific = {name: text for name, text in named.items() if name not in NAMED}
    config.pop("extra_special_tokens", None)
    if tokenizer.extra_special_tokens:
        config["extra_special_tokens"] = tokenizer.extra_special_tokens
    elif specific:
        config["extra_special_tokens"] = specific
    config |= {"backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast", **named}
    return config | {name: getattr(tokenizer, name) for name in _SETTINGS}


def to_transformers(tokenizer: Tokenizer) -> Any:
    """The same tokenizer as a `transformers.PreTrainedTokenizerFast` of its own."""
    import transformers

    left_out = ("backend", "tokenizer_class", "add_bos_token", "add_eos_token")
    options = {k: v for k, v in config_of(tokenizer).items() if k not in left_out}
    templates = tokenizer.chat_template
    build: Any = transformers.PreTrainedTokenizerFast
    return build(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json()),
        name_or_path=tokenizer.name_or_path,
        chat_template=dict(templates) if isinstance(templates, Mapping) else templates,
        **options,
    )


def from_transformers(tokenizer: Any) -> Tokenizer:
    """The tokenizer of a transformers fast tokenizer, which is left as it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ArgumentError(f"expected a transformers fast tokenizer, found {type(tokenizer)}")
    # What the last call padded and truncated to is not the tokenizer's own.
    copied = tokenizers.Tokenizer.from_str(backend.to_str())
    copied.no_padding()
    copied.no_truncation()
    own = ("added_tokens_decoder", "name_or_path", "tokenizer_file", "vocab_file", "chat_template")
    kept = {k: v for k, v in tokenizer.init_kwargs.items() if k not in own and _is_json(v)}
    config = {k: v for k, v in kept.items() if not k.endswith("_token") or isinstance(v, bool)}
    config |= dict(tokenizer.special_tokens_map)
    config["extra_special_tokens"] = list(tokenizer.extra_special_tokens)
    for name in (*_SETTINGS, "split_special_tokens"):
        config[name] = getattr(tokenizer, name)
    return Tokenizer(
        copied,
        config,
        chat_template=tokenizer.chat_template,
        name_or_path=str(tokenizer.name_or_path),
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
