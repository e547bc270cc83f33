"""OpenAI's response bodies, made of the engine's events."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .convert.engine_request import Event, TokenLogprobs
from .convert.tokenizer import Tokenizer
from .errors import PurelmError
from .serve_requests import Asked, Refusal
from .serve_text import AnswerText
from .serve_tools import ToolText

Json = dict[str, Any]

_logger = logging.getLogger("purelm.serve")


def _refusal(problem: Exception) -> Refusal:
    """What a client is told of a request's error, and the log of one that nobody foresaw."""
    if isinstance(problem, PurelmError):
        return Refusal(str(problem))
    if isinstance(problem, torch.OutOfMemoryError):
        return Refusal("there is no memory for this request now; come again later", status=503)
    _logger.error("a request failed", exc_info=problem)
    return Refusal("internal error", status=500)


@dataclass
class Choice:
    """One answer as it grows; out, calls and logprobs are what no chunk has given out yet."""

    text: AnswerText
    tools: ToolText | None = None
    calls: list[Json] = field(default_factory=list)
    out: str = ""
    tokens: int = 0
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish: str | None = None

    def take(self, event: Event, eos: Sequence[int]) -> None:
        """Note an event; raises Refusal where it is an error."""
        if event.error is not None:
            raise _refusal(event.error)
        if event.finish == "cancelled":
            raise Refusal("the server is stopping", status=503)
        if event.token is not None:
            self.tokens += 1
            if event.logprobs is not None:
                self.logprobs.append((event.token, event.logprobs))
            if event.token not in eos or event.finish != "stop":
                self._add(self.text.take(event.token))
        if event.finish is not None:
            self._add(self.text.finish())
            self.finish = "stop" if self.text.stopped else event.finish
            if self.tools is not None:
                rest, self.calls = self.tools.finish()
                self.out += rest
                self.finish = "tool_calls" if self.calls else self.finish

    def _add(self, text: str) -> None:
        self.out += text if self.tools is None else self.tools.take(text)

    def release(self) -> tuple[str, list[tuple[int, TokenLogprobs]]]:
        """What is new, which is then given out."""
        new = self.out, self.logprobs
        self.out, self.logprobs = "", []
        return new


class Answer:
    """The body of one HTTP answer, whole or in chunks; kind: "chat" or "completion"."""

    def __init__(
        self, kind: str, model: str, asked: Asked, tokenizer: Tokenizer, eos: Sequence[int]
    ) -> None:
        self.chat = kind == "chat"
        self.asked, self.tokenizer, self.eos = asked, tokenizer, eos
        self.choices = [
            Choice(
                AnswerText(tokenizer, r.prompt, r.stop_strings),
                ToolText(asked.tools) if asked.tools else None,
            )
            for r in asked.requests
        ]
        prefix, name = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, ids: Sequence[int], events: asyncio.Queue[Event]) -> Json:
        """The body once every choice has ended."""
        async for _ in self._grown(ids, events):
            pass
        choices = []
        for index, choice in enumerate(self.choices):
            text, logprobs = choice.release()
            body = self._choice(index, text, logprobs, choice.finish)
            if self.chat:
                message: Json = {"role": "assistant", "content": text, "refusal": None}
                if choice.calls:
                    message |= {"content": text or None, "tool_calls": choice.calls}
                body["message"] = message
            choices.append(body)
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def chunks(self, ids: Sequence[int], events: asyncio.Queue[Event]) -> AsyncIterator[Json]:
        """The bodies of the stream's events."""
        head = {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head
        if self.asked.usage_in_stream:
            head = {**head, "usage": None}
        if self.chat:
            for index in range(len(self.choices)):
                body = self._choice(index, "", [], None)
                body["delta"] = {"role": "assistant", "content": ""}
                yield {**head, "choices": [body]}
        async for index in self._grown(ids, events):
            choice = self.choices[index]
            text, logprobs = choice.release()
            if not text and not logprobs and choice.finish is None:
                continue
            body = self._choice(index, text, logprobs, choice.finish)
            if self.chat:
                body["delta"] = {"content": text} if text else {}
                if choice.calls:
                    numbered = [{"index": i, **call} for i, call in enumerate(choice.calls)]
                    body["delta"]["tool_calls"] = numbered
            yield {**head, "choices": [body]}
        if self.asked.usage_in_stream:
            yield {**head, "choices": [], "usage": self._usage()}

    async def _grown(self, ids: Sequence[int], events: asyncio.Queue[Event]) -> AsyncIterator[int]:
        """The index of each choice that an event has made longer, until all have ended."""
        index_of = {request_id: index for index, request_id in enumerate(ids)}
        while any(choice.finish is None for choice in self.choices):
            event = await events.get()
            index = index_of[event.id]
            self.choices[index].take(event, self.eos)
            yield index

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: list[tuple[int, TokenLogprobs]],
        finish: str | None,
    ) -> Json:
        wanted = self.asked.requests[index].logprobs is not None
        out: Json = {"index": index, "finish_reason": finish}
        if self.chat:
            content = [self._token(token, p) for token, p in logprobs]
            out["logprobs"] = {"content": content, "refusal": None} if wanted else None
        else:
            out["text"] = text
            out["logprobs"] = self._columns(logprobs) if wanted else None
        return out

    def _token(self, token: int, given: TokenLogprobs) -> Json:
        def one(token: int, logprob: float) -> Json:
            text = self._text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            **one(token, given.logprob),
            "top_logprobs": [one(other, logprob) for other, logprob in given.top],
        }

    def _columns(self, logprobs: list[tuple[int, TokenLogprobs]]) -> Json:
        """The older form, of completions."""
        return {
            "tokens": [self._text(token) for token, _ in logprobs],
            "token_logprobs": [p.logprob for _, p in logprobs],
            "top_logprobs": [{self._text(i): p for i, p in given.top} for _, given in logprobs],
            "text_offset": None,
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _usage(self) -> Json:
        # The choices of one prompt stand next to each other and share it.
        each = len(self.asked.requests) // self.asked.prompts
        prompt = sum(len(r.prompt) for r in self.asked.requests[::each])
        answers = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answers,
            "total_tokens": prompt + answers,
        }
