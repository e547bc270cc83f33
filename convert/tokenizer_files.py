"""A tokenizer's files: reading them strictly, and writing a set that transformers loads.

The set: tokenizer.json (the algorithm and the vocabulary), tokenizer_config.json (the named special
tokens and settings), special_tokens_map.json (older, optional), chat_template.jinja and
additional_chat_templates/ (optional). Nothing here interprets a field.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from ..errors import PurelmError, SaveError, TokenizerError
from . import atomic
from .json_file import MIB, read_json
from .local_file import locate, read_bytes
from .token_patterns import check_patterns

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
NAMES = (TOKENIZER, CONFIG, SPECIAL_MAP, TEMPLATE, "added_tokens.json")

MAX_TOKENIZER_BYTES = 256 * MIB
MAX_TEMPLATE_BYTES = MIB // 4

_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Result = TypeVar("Result")


def rust(call: Callable[[], Result], what: str, error: Callable[[str], PurelmError]) -> Result:
    """`call()`, with what the tokenizers library itself raises turned into `error(message)`.

    That library raises bare `Exception`, and for a fault of its own a `PanicException` that is no
    `Exception` at all; there is nothing narrower to name.
    """
    try:
        return call()
    except BaseException as problem:
        if type(problem) is not Exception and type(problem).__name__ != "PanicException":
            raise
        raise error(f"{what}: {str(problem)[:500]}") from None


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The `tokenizers.Tokenizer` of the folder's tokenizer.json; raises `TokenizerError`."""
    if not folder.is_dir():
        raise TokenizerError("the folder does not exist", file=folder)
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        others = sorted(entry.name for entry in folder.iterdir() if _is_other_format(entry.name))
        hint = (
            f"it has {', '.join(others)}, which must be converted first: open the folder with "
            "transformers.AutoTokenizer and save_pretrained it"
            if others
            else "a tokenizer must be beside the weights, or be given by its own folder"
        )
        raise TokenizerError(f"the folder has no {TOKENIZER}; {hint}", file=folder)
    content = read_bytes(
        locate(folder, TOKENIZER, error=TokenizerError),
        max_bytes=MAX_TOKENIZER_BYTES,
        error=TokenizerError,
    )
    text = _utf8(content, path)
    made = rust(
        lambda: tokenizers.Tokenizer.from_str(text),
        "not a tokenizer.json",
        partial(TokenizerError, file=path),
    )
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        check_patterns(getattr(made, part), part, path)
    return made


def _is_other_format(name: str) -> bool:
    return name.endswith((".model", ".tiktoken")) or name in ("vocab.json", "vocab.txt")


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the older special_tokens_map.json merged in, as transformers does.

    The map counts only where the config lists no `added_tokens_decoder`. An absent config is empty.
    """
    config = _optional_json(folder, CONFIG)
    if "added_tokens_decoder" not in config:
        for name, value in _optional_json(folder, SPECIAL_MAP).items():
            if name == "extra_special_tokens" and isinstance(value, list):
                known = config.get(name) or []
                value = [*known, *(token for token in value if token not in known)]
            config[name] = value
    return config


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    if not os.path.lexists(folder / name):
        return {}
    return read_json(folder / name, error=TokenizerError)


def read_templates(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or named ones; files win over the config's `chat_template`."""
    found: dict[str, str] = {}
    if os.path.lexists(folder / TEMPLATE):
        found["default"] = _read_template(folder, TEMPLATE)
    if (folder / TEMPLATES).is_dir():
        for entry in sorted((folder / TEMPLATES).iterdir()):
            if entry.suffix == ".jinja":
                found[entry.stem] = _read_template(folder / TEMPLATES, entry.name)
    if found:
        return found["default"] if set(found) == {"default"} else found
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        for item in value:
            if not (
                isinstance(item, dict)
                and isinstance(item.get("name"), str)
                and isinstance(item.get("template"), str)
            ):
                raise TokenizerError(
                    "each item of the list chat_template must be an object with the strings "
                    f"'name' and 'template', found {str(item)[:100]}",
                    file=folder / CONFIG,
                )
            found[item["name"]] = item["template"]
        return found
    raise TokenizerError(
        f"chat_template must be a string or a list, found {type(value).__name__}",
        file=folder / CONFIG,
    )


def _read_template(folder: Path, name: str) -> str:
    real = locate(folder, name, error=TokenizerError)
    content = read_bytes(real, max_bytes=MAX_TEMPLATE_BYTES, error=TokenizerError)
    # As Python reads a text file: all line ends become one.
    return _utf8(content, folder / name).replace("\r\n", "\n").replace("\r", "\n")


def _utf8(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise TokenizerError(f"the file is not UTF-8: {problem}", file=path) from None


def write_folder(
    folder: Path,
    tokenizer_json: str,
    config: Mapping[str, Any],
    templates: str | Mapping[str, str] | None,
) -> tuple[str, ...]:
    """Writes the set into `folder` and gives the paths written.

    The folder appears, or changes, whole or not at all. Other files in it are kept, those of an
    older tokenizer are not. Raises `SaveError`.
    """
    files = {TOKENIZER: tokenizer_json}
    if isinstance(templates, str):
        files[TEMPLATE] = templates
    else:
        for name, template in (templates or {}).items():
            if not _TEMPLATE_NAME.fullmatch(name):
                raise SaveError(f"the chat template's name {name!r} cannot be a file's name")
            files[TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja"] = template
    files[CONFIG] = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # Within the save of a whole model, the tokenizer appears with the rest.
    part = folder.is_dir() and atomic.is_leftover(folder)
    try:
        with (
            contextlib.nullcontext(folder)
            if part
            else atomic.folder(folder, replaces=[*NAMES, TEMPLATES])
        ) as work:
            for name, text in files.items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_bytes(text.encode("utf-8"))
    except UnicodeEncodeError as problem:
        raise SaveError(f"the tokenizer could not be saved in {folder}: {problem}") from None
    return tuple(str(folder / name) for name in files)
