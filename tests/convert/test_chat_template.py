"""Chat templates: transformers' texts, the assistant's part of them, and hostile templates."""

import json
import subprocess
import sys
import time

import pytest
from assets import shared
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, MARKED
from transformers.utils.chat_template_utils import render_jinja_template

from purelm.convert import chat_template as chat
from purelm.convert.assistant_turns import assistant_spans, token_mask
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import TemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Pâris <b>"}}}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "today's <weather> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHATS = [
    [user("hello")],
    [user("hello "), assistant(" wörld\n")],
    [
        {"role": "system", "content": "be kind"},
        user("a"),
        assistant("b"),
        user("c"),
        assistant("d"),
    ],
    [
        user("w?"),
        assistant("", tool_calls=CALL),
        {"role": "tool", "content": "3"},
        assistant("3 C"),
    ],
    [
        user("a", name=None),
        assistant("b", thinking="hm"),
        user("c"),
        assistant("d", reasoning="so"),
    ],
]

# What real templates are made of, each once.
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "macro": """{%- macro text(m) -%}{{ m.content | trim }}{%- endmacro -%}
{{- bos_token }}{% for m in messages %}
    {%- if m['role'] == 'system' %}{% continue %}{% endif %}
    [{{ m.role | upper }}] {{ text(m) }}{{ eos_token if m.role == 'assistant' }}
{% endfor %}""",
    "tools": """{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}
{% endfor %}{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}{% endif %}
{%- for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}
{%- endfor %}{{ m.content }}{{ m.reasoning_content | default('') }}{% endfor %}""",
    "namespace": """{% set ns = namespace(last=-1, n=0) %}{% for m in messages[::-1] %}
{%- if ns.last < 0 and m.role == 'user' %}{% set ns.last = messages|length - loop.index %}
{%- endif %}
{%- set ns.n = ns.n + m.content.split(' ')|length %}{% endfor %}{{ ns.last }} {{ ns.n }}
{%- for k, v in messages[0]|dictsort %}{{ k ~ '=' ~ v }}{% endfor %}
{%- if messages[0].role not in ['user', 'system'] %}{{ raise_exception('who?') }}{% endif %}""",
    "documents": "{% for d in documents or [] %}{{ d.title }}:{{ d['text'] }}{% endfor %}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ '%s-%d' % ('a', 3) }}{{ enable_thinking is defined and enable_thinking is false }}"
    "{{ messages[-1].content | safe }}{{ dict(a=1) | tojson }}{{ range(3) | list }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chosen", range(len(CHATS)))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"documents": [{"title": "t", "text": "<x>"}], "enable_thinking": False},
        {"continue_final_message": True},
    ],
)
def test_renders_as_transformers(name, chosen, options):
    template, messages = TEMPLATES[name], CHATS[chosen]
    mask = name == "marked" and "continue_final_message" not in options
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    variables = {k: v for k, v in options.items() if k == "enable_thinking"}
    given_ = {k: v for k, v in options.items() if k != "enable_thinking"}
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=mask,
            **options,
            **SPECIAL,
        )
    except ValueError:
        with pytest.raises(TemplateError, match="continue_final_message"):
            chat.render(template, messages, special_tokens=SPECIAL, **given_)
        return
    ours = chat.render(template, messages, special_tokens=SPECIAL, variables=variables, **given_)
    assert ours.text == texts[0]
    if mask:
        assert list(ours.spans) == spans[0]


CONTENT = st.text(max_size=20) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "\n", "{{ x }}"]
)


@given(contents=st.lists(CONTENT, min_size=1, max_size=5), prompt=st.booleans())
def test_texts_of_any_content(contents, prompt):
    messages = [user(c) if i % 2 == 0 else assistant(c) for i, c in enumerate(contents)]
    for template in (CHATML, MARKED, TEMPLATES["macro"]):
        texts, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, **SPECIAL
        )
        ours = chat.render(template, messages, add_generation_prompt=prompt, special_tokens=SPECIAL)
        assert ours.text == texts[0]
    marked = chat.render(MARKED, messages)
    wanted = [c + "<|im_end|>" for c in contents[1::2]]
    assert [marked.text[a:b] for a, b in marked.spans] == wanted
    # Found without the marks, the turns are the same.
    found = assistant_spans(CHATML, messages)
    assert found.text == marked.text and found.spans == marked.spans


@pytest.mark.parametrize("name", ["minimind", "smollm2"])
def test_real_templates(name):
    tokenizer = Tokenizer.from_folder(shared(f"assets/tokenizers/{name}"))
    template, special = tokenizer.chat_template, tokenizer.special_tokens_map
    for messages in CHATS:
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        for options in ({}, {"add_generation_prompt": True}, {"tools": TOOLS}):
            texts, _ = render_jinja_template(
                [messages], chat_template=template, **options, **special
            )
            assert (
                chat.render(template, messages, special_tokens=special, **options).text == texts[0]
            )
        turns = assistant_spans(template, messages, special_tokens=special)
        count = sum(m["role"] == "assistant" for m in messages)
        assert len(turns.spans) == count
        assert all(turns.text[a:b].endswith("<|im_end|>") for a, b in turns.spans)


# -- the assistant's turns without marks

HISTORY = CHATS[2]


def spans(template, messages=HISTORY):
    found = assistant_spans(template, messages, special_tokens=SPECIAL)
    return [found.text[a:b] for a, b in found.spans]


def test_turns_end_with_their_marker():
    assert spans(CHATML) == ["b<|im_end|>", "d<|im_end|>"]
    assert spans(MARKED) == ["b<|im_end|>", "d<|im_end|>"]


def test_turns_of_a_template_without_marker_keep_their_line_end():
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert spans(plain) == ["b\n", "d\n"]


def test_reasoning_that_only_the_last_turn_has():
    qwen = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    assert spans(qwen) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]


def test_prompts_that_open_reasoning():
    deepseek = """{% for m in messages %}<{{ m.role }}>{{ m.content }}
{%- if m.role == 'assistant' %}<end>{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"""
    assert spans(deepseek) == ["b<end>", "d<end>"]


def test_an_end_of_text_behind_the_last_turn():
    phi = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"""
    assert spans(phi, HISTORY[1:])[0] == "b<|end|>"
    assert spans(phi, HISTORY[1:])[1].startswith("d<|end|>")


def test_a_template_that_is_not_consistent():
    shuffled = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match="message 2 or what stands before"):
        spans(shuffled)
    with pytest.raises(TemplateError, match="begins with the assistant"):
        spans(CHATML, [assistant("a")])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=3),
)
def test_token_mask_is_overlap(lengths, parts):
    offsets, place = [], 0
    for length, gap in lengths:
        offsets.append((place, place + length))
        place += length + gap
    ranges = [(start, start + length) for start, length in parts]
    for (start, end), ours in zip(offsets, token_mask(offsets, ranges), strict=True):
        inside = any(a <= c < b for a, b in ranges for c in range(start, max(end, start + 1)))
        assert ours == inside


# -- refusals


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "malformed in line 1"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | nothing }}", "nothing"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("x" * 70_000, "70000 characters"),
        ("{% set x %}{% generation %}a{% endgeneration %}{% endset %}b{{ x }}", "generation"),
    ],
)
def test_templates_that_fail(template, said):
    with pytest.raises(TemplateError, match=said):
        chat.render(template, CHATS[0])


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "range"]
)
def test_variables_cannot_take_a_name_with_a_meaning(name):
    with pytest.raises(TemplateError, match=name):
        chat.render("{{ bos_token }}", CHATS[0], special_tokens=SPECIAL, variables={name: "x"})


@pytest.mark.parametrize(
    "messages", [[], None, "hi", [3], [["a"]], {"role": "user"}, [user("a"), None]]
)
def test_what_are_no_messages(messages):
    with pytest.raises(TemplateError):
        chat.render(CHATML, messages)


def test_the_input_is_left_as_it_is():
    message = user([{"type": "text", "text": "a"}, {"type": "image", "image": object()}])
    content = list(message["content"])
    chat.render("{{ messages[0].content }}", [message], continue_final_message=False)
    chat.render("{{ messages[0].content[0].text }}", [message], continue_final_message=True)
    assert message == user(content)
    assert "<object>" in chat.render("{{ messages[0].content }}", [message]).text


HOSTILE = {
    "power": "{{ 10 ** (10 ** 8) }}",
    "power of variables": "{% set n = 10 %}{{ n ** n ** n }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "doubling ~": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "doubling +": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "text times": "{{ 'a' * 10 ** 10 }}",
    "list times": "{{ ([0] * 9999999999) | length }}",
    "center": "{{ 'a'.center(9999999999) }}",
    "safe center": "{{ ('a' | safe).center(9999999999) }}",
    "center filter": "{{ 'a' | center(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(9999999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent filter": "{{ '%9999999999d' | format(1) }}",
    "percent names": "{{ ('%(a)s' * 99999) % {'a': 'b' * 99999} }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace(old='a', new='b' * 99999) }}",
    "join": "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "join filter": "{{ range(99999) | map('string') | join('b' * 99999) }}",
    "laughs": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "laughs in json": "{% set ns = namespace(x={}) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "laughs hashed": "{% set ns = namespace(x=()) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}"
    "{% endfor %}{{ {ns.x: 1} }}",
    "laughs compared": "{% set ns = namespace(x=[0], y=[0]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "json indent": "{{ [1] | tojson(indent=999999999) }}",
    "batch": "{{ [1] | batch(999999999, 0) | list }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "sum of lists": "{{ ([[0] * 1000] * 1000) | sum(start=[]) | length }}",
    "bytes": "{{ (5).to_bytes(999999999, 'big') }}",
    "macro doubling": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macro output": "{% macro m() %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}"
    "{% endmacro %}{% for i in range(9999) %}{{ m() }}{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}"
    + "x" * 5000
    + "{% endfor %}{% endfor %}",
    "kept slices": "{% set b = 'a' * 99999 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [b[1:]] %}{% endfor %}",
    "kept splits": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [('a ' * 49999).split()] %}{% endfor %}",
    "search": "{% set l = range(99999) | list %}{% for i in range(99999) %}"
    "{% if 'z' in l %}{% endif %}"
    "{% endfor %}",
    "filtered loop": "{% for j in range(99999) %}{% for i in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "recursive loop": "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "big numbers": "{% set ns = namespace(x=2) %}{% for i in range(999) %}"
    "{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "change": "{{ messages.append(1) }}",
    "namespace class": "{{ namespace(__class__=1) }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end(name):
    began = time.thread_time()
    with pytest.raises(TemplateError):
        chat.render(HOSTILE[name], CHATS[0])
    # The bar is a second; a busy machine's clock is not ours to judge, the thread's own time is.
    assert time.thread_time() - began < 1.0


@pytest.mark.parametrize("name", ["attr", "globals of a function"])
def test_hostile_templates_get_nothing(name):
    template = {
        "attr": "{{ messages | default('') | attr('__class__') }}",
        "globals of a function": "{{ raise_exception.__globals__ }}",
    }[name]
    try:
        assert chat.render(template, CHATS[0]).text == ""
    except TemplateError:
        pass


def test_hostile_templates_need_no_memory():
    script = (
        "import json, resource, sys\n"
        "from purelm.convert import chat_template as chat\n"
        "from purelm.errors import TemplateError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "chat.render('{{ messages }}', [{'role': 'user'}])\n"
        "before = peak()\n"
        "for template in json.load(sys.stdin):\n"
        "    try: chat.render(template, [{'role': 'user', 'content': 'x'}])\n"
        "    except TemplateError: pass\n"
        "print((peak() - before) // 1024)\n"
    )
    quick = [t for n, t in HOSTILE.items() if n not in ("search", "filtered loop")]
    out = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(quick), capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 100


def test_long_conversations_are_within_the_budget():
    messages = [user("word " * 200), assistant("answer " * 200)] * 500
    assert len(chat.render(TEMPLATES["namespace"], messages).text) > 0
    assert len(chat.render(CHATML, messages).text) > 1_000_000
    one = [user("x" * 3_000_000)]
    template = "{% set a = messages[0].content | trim %}{{ a + '!' }}"
    assert len(chat.render(template, one).text) == 3_000_001
