"""A conversation as the text a model was trained on.

Templates are jinja2, as in transformers 5 (`apply_chat_template`), and are run in the sandbox of
chat_sandbox.py. Whatever goes wrong in one is a `TemplateError`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from ..errors import TemplateError
from .chat_budget import Budget
from .chat_sandbox import RefusedMessages, Sandbox

# The largest real ones have 20,000 characters; compiling takes time in proportion.
MAX_TEMPLATE = 1 << 16
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_OWN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))

# What code that a sandbox lets run can raise; a template is somebody else's program.
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, and the character ranges [start, end) that the assistant wrote."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


def marks_generation(template: str) -> bool:
    """Whether the template says itself, by {% generation %} blocks, what the assistant wrote."""
    return _GENERATION.search(template) is not None


def render(
    template: str,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    special_tokens: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """What `template` writes for `messages`; `spans` are its {% generation %} blocks.

    Equal to transformers' rendering of one conversation. `continue_final_message` cuts the text
    after the last message's content (or the field it names). `variables` are the template's own
    options; none may have the name of a special token or of anything the template is given.
    Raises `TemplateError`: the template is malformed, refuses the messages, fails, does what the
    sandbox forbids, or spends more than it may.
    """
    chat = checked_messages(messages)
    field = "content" if continue_final_message is True else continue_final_message
    final = ""
    if field:
        if add_generation_prompt:
            raise TemplateError("continue_final_message excludes add_generation_prompt")
        final = _open_final(chat, field, template)
    given = {
        "messages": chat,
        "tools": _tools(tools),
        "documents": _documents(documents),
        "add_generation_prompt": add_generation_prompt,
        **(special_tokens or {}),
    }
    compiled = _compile(template)
    options = plain(dict(variables or {}))
    taken = sorted(options.keys() & (given.keys() | _OWN | compiled.environment.globals.keys()))
    if taken:
        raise TemplateError(f"a template variable cannot be named {taken[0]!r}: it has a meaning")
    weights: dict[int, int] = {}
    size = sum(
        _weights(value, weights) for value in (chat, given["tools"], given["documents"], options)
    )
    items = len(chat) + sum(len(given[name] or ()) for name in ("tools", "documents"))
    budget = Budget(weights, items, size)
    text = _run(compiled, {**given, **options}, budget)
    spans = _spans(text, budget)
    if field:
        text = _cut(text, final)
        spans = [(start, min(end, len(text))) for start, end in spans if start < len(text)]
    return Rendered(text, tuple(spans))


def _spans(text: str, budget: Budget) -> list[tuple[int, int]]:
    spans = []
    for start, marked in budget.marked:
        if text[start : start + len(marked)] != marked:
            raise TemplateError(
                "a {% generation %} block inside a macro or a {% set %} block has no place in the "
                "text; the template must write it directly"
            )
        spans.append((start, start + len(marked)))
    return spans


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"the chat template has {len(template)} characters; {MAX_TEMPLATE} go")
    try:
        return Sandbox().from_string(template)
    except jinja2.TemplateSyntaxError as problem:
        raise TemplateError(
            f"the chat template is malformed in line {problem.lineno}: {problem.message}"
        ) from None
    except _FAULTS as problem:
        raise TemplateError(f"the chat template cannot be compiled: {_said(problem)}") from None


def _run(compiled: jinja2.Template, variables: dict[str, Any], budget: Budget) -> str:
    pieces = []
    try:
        context = compiled.new_context(variables)
        context.budget = budget  # type: ignore[attr-defined]
        for piece in compiled.root_render_func(context):
            pieces.append(piece)
            budget.position += len(piece)
            if budget.position > 16 * budget.size:
                raise SecurityError(f"it writes more than {16 * budget.size} characters")
    except RefusedMessages as problem:
        raise TemplateError(f"the chat template refuses the messages: {problem}") from None
    except SecurityError as problem:
        raise TemplateError(f"the chat template was stopped: {problem}") from None
    except _FAULTS as problem:
        raise TemplateError(f"the chat template fails on the messages: {_said(problem)}") from None
    return "".join(pieces)


def _said(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {str(problem)[:500]}"


def plain(value: Any) -> Any:
    """`value` made of dict, list, tuple, str, int, float, bool and None alone, freshly.

    Dataclasses and pydantic models become dicts; anything else, such as an image, becomes a text
    that names its type, since templates only ask whether it is there.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as templates get them: plain dicts, reasoning under the names that they read.

    Raises `TemplateError` for what is no list of messages.
    """
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, list | tuple) or not messages:
        raise TemplateError(f"expected a list of messages, found {str(messages)[:100]!r}")
    chat = []
    try:
        converted = plain(list(messages))
    except RecursionError:
        raise TemplateError("the messages are nested too deeply") from None
    for message in converted:
        if not isinstance(message, dict):
            raise TemplateError(f"a message must be a dict, found {str(message)[:100]!r}")
        message = {name: value for name, value in message.items() if value is not None}
        # Reasoning goes under several names; templates read the first, gpt-oss's the second.
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        chat.append(message)
    return chat


def _tools(tools: Any) -> Any:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise TemplateError(f"tools must be a list of JSON schemas, found {type(tools).__name__}")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise TemplateError(
                f"a tool must be given as its JSON schema (a dict), found {str(tool)[:100]}"
            )
    return plain(list(tools))


def _documents(documents: Any) -> Any:
    if documents is None:
        return None
    if not all(isinstance(document, dict) for document in documents):
        raise TemplateError("documents must be a list of dicts, with 'title' and 'text'")
    return plain(list(documents))


def _weights(value: Any, weights: dict[int, int]) -> int:
    """The size of `value` written out; that of each container in it goes into `weights`."""
    if isinstance(value, str):
        return len(value) + 4
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        return 8
    weights[id(value)] = 8 + sum(_weights(part, weights) for part in parts)
    return weights[id(value)]


def _open_final(chat: list[dict[str, Any]], field: str, template: str) -> str:
    """Puts a tag behind the last message's text, in place, and gives that text."""
    final = chat[-1].get(field)
    if final is None:
        raise TemplateError(f"continue_final_message: the last message has no {field!r}")
    fields = [field]
    if field in _REASONING:
        fields = [name for name in _REASONING if chat[-1].get(name) == final]
    if not any(name in template for name in fields):
        raise TemplateError(f"continue_final_message: the chat template does not read {field!r}")
    if isinstance(final, list | tuple):
        for block in reversed(final):
            if isinstance(block, dict) and "text" in block:
                text = str(block["text"])
                block["text"] = text + _TAG
                return text
        raise TemplateError("continue_final_message: the last message has no text to continue")
    for name in fields:
        chat[-1][name] = str(chat[-1][name]) + _TAG
    return str(final)


def _cut(text: str, final: str) -> str:
    place = text.rfind(_TAG.strip())
    if place < 0 or final.strip() not in text:
        raise TemplateError(
            "continue_final_message: the chat template does not write the last message as it is"
        )
    kept = text[:place]
    # Where the template strips what it writes, it would have stripped this text's end too.
    return kept if text.startswith(_TAG, place) else kept.rstrip()
