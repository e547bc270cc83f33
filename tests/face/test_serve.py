"""`purelm serve` as the official openai client sees it, over a loopback port."""

import asyncio
import json
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from served import KEY, NAME, TALK, Site

from purelm import cli, serve
from purelm.errors import ArgumentError
from purelm.serve_options import Options
from purelm.serve_text import AnswerText
from purelm.serve_tools import ToolText


def expected(loaded: Any, new: int) -> str:
    """What `generate` answers to TALK."""
    model, tokenizer = loaded
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(ids["input_ids"], max_new_tokens=new, do_sample=False)
    answer = out[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "purelm"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("other/model")


def test_chat(client: openai.OpenAI, loaded: Any) -> None:
    out = client.chat.completions.create(model=NAME, messages=TALK, temperature=0, max_tokens=9)
    assert out.choices[0].message.content == expected(loaded, 9) != ""
    assert out.choices[0].message.role == "assistant" and out.object == "chat.completion"
    prompt = loaded[1].apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert out.usage is not None and out.usage.prompt_tokens == len(prompt)
    assert out.usage.total_tokens == len(prompt) + out.usage.completion_tokens
    full = out.usage.completion_tokens == 9
    assert out.choices[0].finish_reason == ("length" if full else "stop")


def test_an_answer_without_a_limit_ends_by_itself(client: openai.OpenAI, loaded: Any) -> None:
    out = client.chat.completions.create(model=NAME, messages=TALK, temperature=0)
    assert out.choices[0].finish_reason in ("stop", "length")
    assert (out.choices[0].message.content or "").startswith(expected(loaded, 9))


def test_stream(client: openai.OpenAI, loaded: Any) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=TALK,
        temperature=0,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == expected(loaded, 9) and len([p for p in pieces if p]) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 1
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_stop(client: openai.OpenAI, loaded: Any, streamed: bool) -> None:
    """Cut before the stop string, even where it begins or ends within a token."""
    text = expected(loaded, 12)
    stop = text[3:7]
    asked: Any = {"model": NAME, "messages": TALK, "temperature": 0, "max_tokens": 12}
    asked |= {"stop": [stop, "never in it"]}
    if streamed:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        got = "".join(c.choices[0].delta.content or "" for c in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        got, finish = choice.message.content, choice.finish_reason
    assert (got, finish) == (text[: text.index(stop)], "stop")


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        out = client.completions.create(
            model=NAME, prompt="The", max_tokens=8, n=4, seed=seed, temperature=1.3
        )
        assert [c.index for c in out.choices] == [0, 1, 2, 3]
        assert out.usage is not None and out.usage.completion_tokens <= 32
        return [c.text for c in out.choices]

    first = ask(7)
    assert first == ask(7) != ask(100) and len(set(first)) > 1


def test_completions_of_texts_and_ids(client: openai.OpenAI, loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tokenizer("The capital")["input_ids"]
    both: Any = {"model": NAME, "max_tokens": 6, "temperature": 0}
    texts = client.completions.create(prompt=["The capital", "A dog"], **both)
    (one,) = client.completions.create(prompt=ids, **both).choices
    assert len(texts.choices) == 2 and texts.choices[0].text == one.text
    out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0]
    whole = str(tokenizer.decode(out, skip_special_tokens=True))
    assert whole == str(tokenizer.decode(ids, skip_special_tokens=True)) + one.text


def test_logprobs(client: openai.OpenAI) -> None:
    out = client.chat.completions.create(
        model=NAME, messages=TALK, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    given = out.choices[0].logprobs
    assert given is not None and given.content is not None and out.usage is not None
    assert len(given.content) == out.usage.completion_tokens
    for token in given.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy takes the likeliest
    old = client.completions.create(model=NAME, prompt="The", max_tokens=3, logprobs=2)
    columns = old.choices[0].logprobs
    assert columns is not None and columns.tokens is not None and columns.token_logprobs is not None
    assert len(columns.tokens) == len(columns.token_logprobs) > 0


def test_logit_bias_and_penalties_reach_the_engine(client: openai.OpenAI, loaded: Any) -> None:
    token = loaded[1]("dog", add_special_tokens=False)["input_ids"][-1]
    out = client.completions.create(
        model=NAME, prompt="The", max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert out.choices[0].text == loaded[1].decode([token] * 3)


def test_answers_keep_to_a_schema(client: openai.OpenAI) -> None:
    values = {"type": "integer", "minimum": 3, "maximum": 5}
    schema = {"type": "object", "properties": {"n": values}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    asked: Any = {"model": NAME, "messages": TALK, "max_tokens": 150, "response_format": wanted}
    whole = client.chat.completions.create(**asked, n=2, seed=1)
    streamed = client.chat.completions.create(**asked, stream=True)
    texts = [choice.message.content or "" for choice in whole.choices]
    texts.append("".join(c.choices[0].delta.content or "" for c in streamed))
    for text in texts:
        assert json.loads(text)["n"] in (3, 4, 5)


TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_tools_are_called(
    client: openai.OpenAI, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a template that shows them; the answer is made to be a call by its schema."""
    tokenizer = loaded[1]
    shown = "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    for message in ("{% for m in messages %}{{ m.content }}", "{% if m.tool_calls %}"):
        shown += message
    shown += "{{ m.tool_calls[0].function.arguments.town }}{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", shown)
    where = {"type": "object", "properties": {"town": {"enum": ["Dahl", "Galt"]}}}
    where |= {"required": ["town"], "additionalProperties": False}
    schema: Any = {"type": "object", "properties": {"name": {"const": "weather"}}}
    schema["properties"]["arguments"] = where
    schema |= {"required": ["name", "arguments"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}
    earlier: Any = {"id": "c", "type": "function"}
    earlier["function"] = {"name": "weather", "arguments": '{"town": "Brenn"}'}
    talk: Any = [*TALK, {"role": "assistant", "content": None, "tool_calls": [earlier]}]
    asked: Any = {"model": NAME, "messages": talk, "tools": [TOOL], "max_tokens": 150}
    # JSON may be spaced at any length, which small models like.
    blank = [i for i in range(4, len(tokenizer)) if not str(tokenizer.decode([i])).strip()]
    asked["logit_bias"] = dict.fromkeys(map(str, blank), -100)
    whole = client.chat.completions.create(**asked, response_format=wanted)
    chunks = list(client.chat.completions.create(**asked, response_format=wanted, stream=True))
    plain = client.chat.completions.create(**{**asked, "tool_choice": "none"})
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.function.name == "weather" and call.id
    assert json.loads(call.function.arguments)["town"] in ("Dahl", "Galt")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    (delta,) = chunks[-1].choices[0].delta.tool_calls or ()
    assert delta.index == 0 and delta.function is not None and delta.function.name == "weather"
    assert not any(c.choices[0].delta.content for c in chunks)

    # The template was given the tools, and the earlier call's arguments as an object.
    earlier["function"]["arguments"] = {"town": "Brenn"}
    with_tools, without = (
        len(tokenizer.apply_chat_template(talk, given, add_generation_prompt=True)["input_ids"])
        for given in ([TOOL], None)
    )
    assert "Brenn" in tokenizer.apply_chat_template(talk, tokenize=False)
    assert plain.usage is not None and whole.usage is not None
    assert plain.usage.prompt_tokens == without < with_tools == whole.usage.prompt_tokens


@pytest.mark.parametrize(
    ("answer", "text", "names"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', "", ["f"]),
        ('  [{"name": "f", "parameters": {}}, {"name": "g"}]', "", ["f", "g"]),
        ('{"name": "h", "arguments": {}}', '{"name": "h", "arguments": {}}', []),
        ('{"town": 3}', '{"town": 3}', []),
        ("[1] says so", "[1] says so", []),
        ('I look. <tool_call>\n{"name": "f"}\n</tool_call>', "I look. ", ["f"]),
        (
            '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
            "",
            ["f", "g"],
        ),
        ('{"name": "f", "arguments": "\\ud800"}', '{"name": "f", "arguments": "\\ud800"}', []),
        ("[" * 5000, "[" * 5000, []),
        ("a <tool_call> is no call", "a <tool_call> is no call", []),
        ('Say {"name": "f"}', 'Say {"name": "f"}', []),
        ("<tool_c", "<tool_c", []),
        ("", "", []),
    ],
)
def test_calls_in_an_answer(answer: str, text: str, names: list[str]) -> None:
    """However it is cut into pieces; what is given out early is never part of a call."""
    for size in (1, 3, 100):
        tools = ToolText(frozenset({"f", "g"}))
        early = "".join(tools.take(answer[i : i + size]) for i in range(0, len(answer), size))
        rest, calls = tools.finish()
        assert early + rest == text
        assert [call["function"]["name"] for call in calls] == names
        assert all(isinstance(call["function"]["arguments"], str) for call in calls)


def test_many_at_once(site: Site) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=site.url, api_key=KEY, max_retries=0) as client:
            made = [
                client.completions.create(
                    model=NAME, prompt="The", max_tokens=1 + i % 7, seed=5, temperature=1.2
                )
                for i in range(20)
            ]
            return [c.choices[0].text for c in await asyncio.gather(*made)]

    texts = asyncio.run(ask())
    # The same seed draws the same answer, however long and in whatever company.
    for i, text in enumerate(texts):
        assert texts[6].startswith(text) and text == texts[i % 7]


def test_text_holds_back_what_may_become_a_stop(loaded: Any) -> None:
    tokenizer = loaded[1]
    ids = tokenizer("abab abac", add_special_tokens=False)["input_ids"]
    text = str(tokenizer.decode(ids))
    for stop in ("abac", "b a", "zz", text, "c!"):
        answer = AnswerText(tokenizer, ids, (stop,))
        pieces = [answer.take(i) for i in ids] + [answer.finish()]
        whole = str(tokenizer.decode(ids + ids))[len(text) :]
        assert "".join(pieces) == whole.split(stop)[0]
        assert answer.stopped == (stop in whole)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "PURELM_API_KEY"),
        (["--slots", "0"], "slots"),
        (["--port", "70000"], "port"),
        (["--api-key", ""], "empty"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "purelm/tiny", *arguments]) != 0
    assert says in capsys.readouterr().err


def test_the_command_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PURELM_API_KEY", KEY)
    served: list[Any] = []
    monkeypatch.setattr(serve, "run", lambda *arguments: served.append(arguments))
    more = ["--allow-host", "Lab", "--allow-host", "b", "--lookup-tokens", "4"]
    assert cli.main(["serve", "purelm/tiny", "--device", "cpu", "--slots", "3", *more]) == 0
    ((model, tokenizer, options),) = served
    assert (options.name, options.api_key, options.slots) == ("purelm/tiny", KEY, 3)
    assert options.allowed_hosts == ("Lab", "b") and options.lookup_tokens == 4
    assert serve.app(model, tokenizer, options).state.worker.engine._guessed is not None
    assert model.spec.vocab >= len(tokenizer)


def test_only_loopback_goes_without_a_key() -> None:
    for host in (Options(NAME).host, "::1", "LocalHost", "a.localhost"):
        assert Options(NAME, host=host).api_key is None
    with pytest.raises(ArgumentError):
        Options(NAME, host="192.168.0.1")
