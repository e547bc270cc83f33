"""Publishers' chat templates, those that TRL carries, and our model's: transformers' texts of many
conversations.
"""

import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import purelm
from purelm.convert import chat_template as chat
from purelm.errors import TemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WORDS = (
    "hello wörld 你好 <b>&amp;</b> \n\n <think> </think> {{x}} {%if%} 'single' \"double\" \\n  "
    "<|im_end|> [INST] 1,000.5 naïve\u200b 👩‍👧 \t tab </s> ```py\nx=1\n``` <tool_call> final"
).split(" ")


def templates() -> list[Path]:
    """Our own, and those of an installed TRL; no import of it, which takes seconds."""
    own = Path(purelm.__file__).parent / "data" / "tiny" / "chat_template.jinja"
    found = find_spec("trl")
    where = found and found.submodule_search_locations
    return [own, *(sorted((Path(where[0]) / "chat_templates").glob("*.jinja")) if where else ())]


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(0, 6)))


def schema(draw: random.Random, name: str) -> dict[str, Any]:
    kinds = ("string", "integer", "boolean", "number")
    properties = {
        f"arg{i}": {"type": draw.choice(kinds), "description": text(draw)}
        for i in range(draw.randint(0, 3))
    }
    if properties and draw.random() < 0.3:
        properties["arg0"]["enum"] = ["a", "b<"]
    if draw.random() < 0.2:
        properties["list"] = {"type": "array", "items": {"type": "string"}, "description": "l"}
    if draw.random() < 0.2:
        properties["inner"] = {"type": "object", "properties": {"x": {"type": "number"}}}
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
    function = {"name": name, "description": text(draw), "parameters": parameters}
    if draw.random() < 0.2:
        function["return"] = {"type": "string", "description": "what it says"}
    return {"type": "function", "function": function}


def content(draw: random.Random, blocks_only: bool) -> Any:
    """Mostly a text, now and then the blocks that newer templates read."""
    if not blocks_only and draw.random() < 0.9:
        return text(draw)
    blocks = [{"type": "text", "text": text(draw)} for _ in range(draw.randint(1, 2))]
    return blocks + [{"type": "image"}] * draw.randint(0, 1)


def turns(draw: random.Random, tools: bool, blocks: bool) -> Iterator[dict[str, Any]]:
    """A user's question, what the assistant called and got, and its answer."""
    yield {"role": "user", "content": content(draw, blocks)}
    if tools and draw.random() < 0.6:
        calls = []
        for i in range(draw.randint(1, 2)):
            arguments = {"arg0": text(draw), "n": draw.randint(-5, 5), "deep": {"a": [1, None]}}
            function = {"name": f"f{i}", "arguments": arguments}
            calls.append({"type": "function", "id": f"call{i:05d}", "function": function})
        call = {"role": "assistant", "content": text(draw), "tool_calls": calls}
        if draw.random() < 0.3:
            call["reasoning_content"] = text(draw)
        yield call
        for made in calls:
            result = text(draw) if draw.random() < 0.7 else json.dumps({"r": text(draw)})
            name = made["function"]["name"]
            yield {"role": "tool", "name": name, "tool_call_id": made["id"], "content": result}
    answer = {"role": "assistant", "content": content(draw, blocks)}
    if draw.random() < 0.3:
        answer[draw.choice(["reasoning_content", "thinking", "reasoning"])] = text(draw)
    if draw.random() < 0.1:
        answer["content"] = f"<think>\n{text(draw)}\n</think>\n\n{text(draw)}"
    yield answer


def conversation(number: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Messages, what transformers' apply_chat_template takes beside, and the template's options."""
    draw = random.Random(number)
    tools = [schema(draw, f"f{i}") for i in range(draw.randint(1, 3))]
    with_tools = draw.random() < 0.4
    blocks = draw.random() < 0.2
    messages = [m for _ in range(draw.randint(1, 3)) for m in turns(draw, with_tools, blocks)]
    if draw.random() < 0.5:
        role = "system" if draw.random() < 0.9 else "developer"
        said = content(draw, True) if blocks else text(draw)
        messages.insert(0, {"role": role, "content": said})
    given: dict[str, Any] = {"tools": tools if with_tools else None}
    how = draw.random()
    if how < 0.3:
        while messages[-1]["role"] == "assistant" and len(messages) > 1:
            messages.pop()
        given["add_generation_prompt"] = True
    elif how < 0.4:
        given["continue_final_message"] = True
    if draw.random() < 0.1:
        documents = [{"title": text(draw), "text": text(draw)} for _ in range(2)]
        given["documents"] = documents
    options: dict[str, Any] = {}
    if draw.random() < 0.4:
        options["enable_thinking"] = draw.random() < 0.5
    if draw.random() < 0.1:
        options["reasoning_effort"] = draw.choice(["low", "high"])
    if draw.random() < 0.05:
        messages[draw.randrange(len(messages))]["role"] = "ipython"  # most refuse this
    return messages, given, options


def differences(path: Path, numbers: range) -> tuple[int, list[int]]:
    """How many conversations the template takes, and which of all come out differently."""
    template, taken, wrong = path.read_text(encoding="utf-8"), 0, []
    marks = chat.marks_generation(template)
    for number in numbers:
        messages, given, options = conversation(number)
        masked = marks and "continue_final_message" not in given
        try:
            texts, spans = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=masked,
                **given, **options, **SPECIAL,
            )  # fmt: skip
            want = texts[0], spans[0] if masked else None
        except Exception:
            # Whatever goes wrong in a template is jinja2's or Python's own exception there.
            want = None
        try:
            got = chat.render(
                template, messages, special_tokens=SPECIAL, variables=options, **given
            )
            ours = got.text, list(got.spans) if masked else None
        except TemplateError:
            ours = None
        taken += want is not None
        if ours != want:
            wrong.append(number)
    return taken, wrong


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_twenty_conversations(path: Path) -> None:
    taken, wrong = differences(path, range(20))
    assert not wrong and taken >= 1


@pytest.mark.full
@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_two_hundred_conversations(path: Path) -> None:
    taken, wrong = differences(path, range(200))
    print(f"{path.stem}: {taken} of 200 conversations taken, {len(wrong)} written differently")
    assert not wrong and taken >= 20
