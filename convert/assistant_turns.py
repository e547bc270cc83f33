"""Which of a conversation's text the assistant wrote: what a model learns to write.

A template may say so itself, by {% generation %} blocks; where it does not, its turns are found by
rendering the conversation up to each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TemplateError
from .chat_template import Rendered, checked_messages, marks_generation, render

# A generation prompt may open a reasoning block that the template leaves out of past turns.
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
# The beginning of a marker, at the end of a text that was cut where two texts part.
_BROKEN = re.compile(r"(?:<[^<>\s]*|\[[^\[\]\s]*)\Z")


def token_mask(
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    special: Sequence[int] | None = None,
) -> list[int]:
    """1 for each token whose characters overlap a span, else 0.

    `offsets` [s] are the tokens' character ranges in the text. A token without characters (white
    space that the offsets leave out) belongs to the span it stands in. Where `special` [s] is 1 the
    tokenizer added the token, or it pads, and it belongs to none.
    """
    mask = [0] * len(offsets)
    for index, (start, end) in enumerate(offsets):
        if special is not None and special[index] and end == start:
            continue
        mask[index] = int(any(a < max(end, start + 1) and start < b for a, b in spans))
    return mask


def assistant_spans(
    template: str,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """The conversation's text and the character range of each assistant turn in it.

    A turn is what the model must write after the generation prompt, its end marker (`<|im_end|>`)
    included and white space after that marker not. {% generation %} blocks say it where the
    template has them. Otherwise the turns are found by rendering the messages before each one, and
    a `TemplateError` says so where the template does not render those the same way every time.
    """
    options = {
        "tools": tools,
        "documents": documents,
        "special_tokens": special_tokens,
        "variables": variables,
    }
    whole = render(template, messages, **options)  # type: ignore[arg-type]
    if marks_generation(template):
        return whole
    text = whole.text
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(checked_messages(messages)):
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise TemplateError("the conversation begins with the assistant: nothing prompts it")
        before = render(template, messages[:index], add_generation_prompt=True, **options).text  # type: ignore[arg-type]
        after = render(template, messages[: index + 1], **options).text  # type: ignore[arg-type]
        start = _turn_start(text, before, after)
        end = _turn_end(text, start, after[start:], _anchor(message)) if start >= 0 else -1
        if end < 0:
            raise TemplateError(
                f"the chat template writes message {index} or what stands before it differently "
                "when more messages follow, so the assistant's part of the text cannot be told; "
                "use a template with {% generation %} blocks"
            )
        if end > start:
            spans.append((start, end))
    return Rendered(text, tuple(spans))


def _anchor(message: Mapping[str, Any]) -> str:
    """Text of the message that every way of writing it must contain."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [block.get("text") for block in content if isinstance(block, dict)]
        content = next((text for text in reversed(texts) if isinstance(text, str)), "")
    if isinstance(content, str) and content.strip():
        return content.strip()
    calls = message.get("tool_calls")
    call = calls[-1] if isinstance(calls, list) and calls else {}
    function = call.get("function", call) if isinstance(call, dict) else {}
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _turn_start(text: str, before: str, after: str) -> int:
    for prompt in (before, _OPENED.sub("", before)):
        if text.startswith(prompt) and after.startswith(prompt):
            return len(prompt)
    return -1


def _turn_end(text: str, start: int, turn: str, anchor: str) -> int:
    """Where the assistant's turn that begins at `start` ends in `text`; -1 where it cannot be told.

    `turn` is how the template writes it when it is the last. Then a template may put more before it
    (a reasoning block) or behind it (an end of text); what both ways have in common must be found
    in `text`, and must hold `anchor` and an end marker.
    """
    place = turn.find(anchor) if anchor else -1
    behind = place + len(anchor) if place >= 0 else 0

    def trimmed(end: int) -> int:
        # The marker ends the turn; a line end behind it is the template's, not the model's.
        tail = turn[behind:end]
        return end - len(tail) + len(tail.rstrip()) if tail.strip() else end

    if text.startswith(turn, start):
        return start + trimmed(len(turn))
    if place < 0:
        return -1
    for skipped in range(1, place + 1):
        if text.startswith(turn[skipped:], start):
            return start + trimmed(len(turn)) - skipped
    if (again := text.find(turn[place:], start)) >= 0:
        return again + trimmed(len(turn)) - place
    common = os.path.commonprefix([turn, text[start:]])
    common = _BROKEN.sub("", common)
    if common[behind:].strip():
        return start + trimmed(len(common))
    return -1
