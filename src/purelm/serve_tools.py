"""Tools in OpenAI's API: given to the chat template, and calls of them found in answers.

How a model writes a call its training decides. Found are <tool_call>{...}</tool_call> (Hermes,
Qwen), and an answer that is one JSON object or a list of them (Llama 3, Mistral), each with a name
and "arguments" or "parameters".
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import serve_json
from .serve_text import begun

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Json = dict[str, Any]


class ToolProblem(ValueError):
    """What is wrong with a body's tools."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def tools_of(body: Mapping[str, Any], template: str) -> list[Json]:
    """The functions that may be called; raises ToolProblem."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(tools, list):
        raise ToolProblem("tools must be a list", "tools")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named or tool.get("type") != "function":
            raise ToolProblem('each tool is {"type": "function", "function": {"name"...}}', "tools")
    if choice not in (None, "none", "auto"):
        raise ToolProblem(
            f"tool_choice is {choice!r:.50}, expected 'none' or 'auto'", "tool_choice"
        )
    if not tools or choice == "none":
        return []
    if "tools" not in template:
        raise ToolProblem("tools is not supported: the model's chat template has none", "tools")
    return tools


def with_objects(messages: Sequence[Json]) -> list[Json]:
    """The messages with the arguments of earlier calls as templates take them, not as text."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = serve_json.read(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


@dataclass
class ToolText:
    """An answer's text as it comes, of which calls of the functions `names` are no part."""

    names: frozenset[str]
    held: str = ""
    began: bool = False

    def take(self, text: str) -> str:
        """What is certain to be text."""
        self.held += text
        if not self.began and self.held.lstrip()[:1] in ("", "{", "["):
            return ""  # all of it may be a call
        place = self.held.find(OPEN)
        if place < 0:
            place = len(self.held) - begun(self.held, OPEN)
        out, self.held = self.held[:place], self.held[place:]
        self.began = self.began or bool(out.strip())
        return out

    def finish(self) -> tuple[str, list[Json]]:
        """The rest, which is text or calls."""
        text, calls = "", []
        for i, part in enumerate(self.held.split(OPEN)):
            inside, closed, after = part.partition(CLOSE)
            found = self._calls(inside) if i or not self.began else []
            if not found:
                text += OPEN * bool(i) + part
                continue
            calls += found
            text += after if closed else ""
        return ("" if calls and not text.strip() else text), calls

    def _calls(self, text: str) -> list[Json]:
        """What is nothing but calls of known functions."""
        try:
            given = serve_json.read(text)
        except ValueError:
            return []
        found = []
        for one in given if isinstance(given, list) else [given]:
            name = one.get("name") if isinstance(one, dict) else None
            arguments = one.get("arguments", one.get("parameters", {})) if name else None
            if not isinstance(name, str) or name not in self.names:
                return []
            written = arguments if isinstance(arguments, str) else json.dumps(arguments)
            function = {"name": name, "arguments": written}
            found.append(
                {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
            )
        return found
