"""OpenAI's request bodies, read into requests to the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .convert.constraint import Constraint
from .convert.engine_request import Request
from .convert.tokenizer import Tokenizer
from .errors import PurelmError
from .nn.sampling import Sampling
from .serve_options import Options
from .serve_tools import ToolProblem, tools_of, with_objects

MAX_SCHEMA = 64 * 1024  # characters of a JSON schema


class Refusal(Exception):
    """An answer with an HTTP status and OpenAI's error object."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Asked:
    """One request of each choice: prompt after prompt, n of each. tools: names of functions that
    answers may call.
    """

    requests: tuple[Request, ...]
    prompts: int
    stream: bool
    usage_in_stream: bool
    tools: frozenset[str] = frozenset()


# What says nothing about the answer, and what is taken only at the value that asks for nothing.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})
IDLE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
}
SHARED = frozenset(
    "model max_tokens temperature top_p n stream stream_options stop presence_penalty "
    "frequency_penalty logit_bias logprobs seed top_k min_p repetition_penalty min_tokens "
    "response_format".split()
)

CHAT = frozenset("messages max_completion_tokens top_logprobs tools tool_choice".split())


class Fields:
    """A JSON object whose values are read with a check of their kind."""

    def __init__(self, body: Any, own: frozenset[str]) -> None:
        if not isinstance(body, Mapping):
            raise Refusal("the body is not a JSON object")
        self.body = body
        for name, value in body.items():
            if name in SHARED or name in own or name in IGNORED or value is None:
                continue
            if name not in IDLE:
                raise Refusal(f"unknown parameter: {name}", param=name, code="unknown_parameter")
            if value not in IDLE[name]:
                raise Refusal(f"{name} is not supported", param=name, code="unsupported_parameter")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number between two bounds."""
        return float(self._read(name, default, (int, float), low, high))

    def whole(self, name: str, default: int | None, low: int, high: int) -> Any:
        """A whole number between two bounds."""
        return self._read(name, default, (int,), low, high)

    def flag(self, name: str) -> bool:
        """True or false, false by default."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise Refusal(f"{name} is {value!r}, expected true or false", param=name)
        return bool(value)

    def _read(
        self, name: str, default: Any, kinds: tuple[type, ...], low: float, high: float
    ) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or not low <= self.body[name] <= high:
            what = "a number" if float in kinds else "a whole number"
            raise Refusal(f"{name} is {value!r}, expected {what} from {low} to {high}", param=name)
        return value


def chat(body: Any, tokenizer: Tokenizer, options: Options, context: int) -> Asked:
    """Read the body of /v1/chat/completions; raises Refusal."""
    fields = Fields(body, CHAT)
    messages = fields.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages must be a list of messages, one or more", param="messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal("each message is an object with a role", param="messages")
    try:
        tools = tools_of(fields.body, tokenizer.get_chat_template(None, fields.body.get("tools")))
        prompt = tokenizer.apply_chat_template(
            with_objects(messages), tools or None, add_generation_prompt=True
        )["input_ids"]
    except ToolProblem as problem:
        raise Refusal(str(problem), param=problem.param) from None
    except PurelmError as problem:
        raise Refusal(str(problem), param="messages") from None
    top = fields.whole("top_logprobs", None, 0, 20)
    if top is not None and not fields.flag("logprobs"):
        raise Refusal("top_logprobs needs logprobs: true", param="top_logprobs")
    most = fields.whole("max_completion_tokens", None, 1, options.max_tokens)
    most = fields.whole("max_tokens", most, 1, options.max_tokens)
    if most is None:
        most = max(1, min(options.max_tokens, context - len(prompt)))
    logprobs = (top or 0) if fields.flag("logprobs") else None
    asked = _asked(fields, [tuple(prompt)], most, logprobs, options)
    return replace(asked, tools=frozenset(tool["function"]["name"] for tool in tools))


def completion(body: Any, tokenizer: Tokenizer, options: Options) -> Asked:
    """Read the body of /v1/completions; raises Refusal."""
    fields = Fields(body, frozenset({"prompt"}))
    most = fields.whole("max_tokens", min(16, options.max_tokens), 1, options.max_tokens)
    logprobs = fields.whole("logprobs", None, 0, 5)
    return _asked(fields, _prompts(fields.body.get("prompt"), tokenizer), most, logprobs, options)


def _prompts(value: Any, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A text, texts, token ids, or lists of them."""

    def ids(one: Any) -> bool:
        return isinstance(one, list) and all(type(i) is int for i in one)

    many = value if isinstance(value, list) and not (value and ids(value)) else [value]
    if not many or not all(isinstance(one, str) or ids(one) for one in many):
        raise Refusal("prompt must be a text, token ids, or a list of either", param="prompt")
    return [
        tuple(tokenizer(one, verbose=False)["input_ids"] if isinstance(one, str) else one)
        for one in many
    ]


def _asked(
    fields: Fields,
    prompts: list[tuple[int, ...]],
    most: int,
    logprobs: int | None,
    options: Options,
) -> Asked:
    n = fields.whole("n", 1, 1, options.max_choices)
    if n * len(prompts) > options.max_choices:
        raise Refusal(
            f"{len(prompts)} prompts of n={n} are more than {options.max_choices} choices",
            param="prompt",
        )
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 0, 1),
        top_k=max(0, fields.whole("top_k", 0, -1, 2**31)),
        min_p=fields.number("min_p", 0.0, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        min_new_tokens=fields.whole("min_tokens", 0, 0, options.max_tokens),
        sequence_bias=_biases(fields.body.get("logit_bias")),
    )
    constraint = _format(fields.body.get("response_format"))
    requests = tuple(
        Request(
            prompt,
            most,
            sampling=sampling,
            # The choices of one prompt differ, and are the same again with the same seed.
            seed=None if seed is None else (seed + choice) % 2**63,
            stop_strings=_stops(fields.body.get("stop")),
            logprobs=logprobs,
            constraint=constraint,
        )
        for prompt in prompts
        for choice in range(n)
    )
    options_of_stream = fields.body.get("stream_options") or {}
    if not isinstance(options_of_stream, Mapping):
        raise Refusal("stream_options must be an object", param="stream_options")
    usage = bool(options_of_stream.get("include_usage"))
    return Asked(requests, len(prompts), fields.flag("stream"), usage)


def _format(value: Any) -> Constraint | None:
    """OpenAI's response_format: text, json_object, or json_schema with its schema."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(json_object=True)
    described = value.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise Refusal(
            "response_format must be of type text, json_object, or json_schema with a schema",
            param="response_format",
        )
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA:
        raise Refusal(
            f"the schema has {len(text)} characters, at most {MAX_SCHEMA} are taken",
            param="response_format",
        )
    return Constraint(json=text)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise Refusal("stop must be a text or a list of texts, none empty", param="stop")
    if len(stops) > 4:
        raise Refusal(f"stop has {len(stops)} texts, at most 4 are taken", param="stop")
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    if value is None:
        return ()
    wanted = "logit_bias must be an object of token ids and numbers from -100 to 100"
    if not isinstance(value, Mapping) or len(value) > 1024:
        raise Refusal(wanted, param="logit_bias")
    out = []
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not token.isdecimal() or not number or not math.fabs(bias) <= 100:
            raise Refusal(wanted, param="logit_bias")
        out.append(((int(token),), float(bias)))
    return tuple(out)
