"""The jinja2 sandbox that chat templates run in, with a budget for what they may spend.

A template comes out of a repository. jinja2's immutable sandbox keeps it from reaching Python, but
lets `'a' * 10**10` or nested loops take all memory and time. So every operation that can make
something large is priced before it runs, every loop turn and call costs a step, and the steps, the
size of one value and the thread's processor time are limited in proportion to the input.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from .chat_budget import (
    MAX_WIDTH,
    Budget,
    check_format,
    check_join,
    check_method,
    check_product,
    check_replace,
    check_width,
    size_of,
)

_FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse "
    "round safe select selectattr slice sort string sum title trim truncate unique upper urlencode "
    "wordcount"
).split()
_WIDTHS = ("batch", "center", "indent", "round", "slice")


class _Context(Context):
    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        context.budget = self.budget  # type: ignore[attr-defined]
        return context


class _Generator(CodeGenerator):
    """Writes the template's Python with a toll at each place that can make much of little."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loops: dict[int, int] = {}

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        text = sum(len(data.data) for part in node.body for data in _texts(part))
        self._loops[id(node.body)] = 1 + text // 64
        super().visit_For(node, frame)

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        if id(nodes) in self._loops:
            self.writeline(f"context.budget.spend({self._loops[id(nodes)]})")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            raise SecurityError("a chat template may not escape what it writes")
        self.write("environment.concatenated(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._built(node, frame, super().visit_Tuple, node.ctx == "load")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._built(node, frame, super().visit_List)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._built(node, frame, super().visit_Dict)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        sliced = isinstance(node.arg, nodes.Slice)
        self._built(node, frame, super().visit_Getitem, sliced)

    def _built(
        self, node: Any, frame: Frame, visit: Callable[[Any, Frame], None], toll: bool = True
    ) -> None:
        if toll:
            self.write("environment.built(context, ")
        visit(node, frame)
        if toll:
            self.write(")")


def _texts(node: nodes.Node) -> Iterable[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        return [node]
    return node.find_all(nodes.TemplateData)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, noted with its place."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Any, caller: Callable[[], str]) -> str:
        text = caller()
        context.budget.marked.append((context.budget.position, text))
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates: transformers' blocks, filters and functions, priced."""

    code_generator_class = _Generator
    context_class = _Context
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
        )
        given = self.filters
        self.filters = {name: _priced(name, given[name]) for name in _FILTERS}
        self.filters["tojson"] = _priced("tojson", _tojson)
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"} | {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget: Budget = context.budget
        budget.spend(1)
        if operator == "+":
            budget.allow(size_of(left) + size_of(right))
        elif operator == "**":
            if not all(isinstance(side, int | float) for side in (left, right)) or (
                abs(right) > 64 or abs(left) > 2**32
            ):
                raise SecurityError("it raises to a large power")
        elif operator == "*":
            check_product(budget, left, right)
        elif operator == "%" and isinstance(left, str):
            check_format(budget, left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, list | tuple):
            budget.weigh(result)
        return result

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.budget
        budget.spend(1)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | bytes | dict | list | tuple | int | float):
            check_method(budget, owner, obj.__name__, args)
        return self.built(context, super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> None:
        """None: str.format is refused like any method that is not offered."""

    def built(self, context: Any, value: Any) -> Any:
        """`value`, paid for after it was made; what makes it must be cheap or priced before."""
        if isinstance(value, str):
            context.budget.allow(len(value))
        elif isinstance(value, list | tuple | dict):
            context.budget.weigh(value)
        return value

    def concatenated(self, context: Any, parts: tuple[Any, ...]) -> str:
        budget: Budget = context.budget
        budget.allow(sum(budget.weigh(part) for part in parts))
        return "".join(str(part) for part in parts)


def _priced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `function`, refused or paid for by what it is given and what it makes."""
    passed = getattr(function, "jinja_pass_arg", None)
    kind = None if passed is None else passed.name

    @pass_context
    @functools.wraps(function)
    def priced(context: Any, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.budget
        budget.spend(1)
        if name in _WIDTHS:
            check_width(*args, *kwargs.values())
        elif name == "replace":
            named = [kwargs[word] for word in ("old", "new") if word in kwargs]
            check_replace(budget, str(value), *[*args[:2], *named][:2])
        elif name == "join":
            value = list(value) if not isinstance(value, str) else value
            glue = args[0] if args else kwargs.get("d", "")
            if kwargs.get("attribute") is None and len(args) < 2:
                check_join(budget, str(glue), value)
            else:
                budget.allow(len(value) * (len(str(glue)) + budget.size // MAX_WIDTH))
        elif name == "format":
            check_format(budget, str(value), [*args, *kwargs.values()])
        elif name == "sum":
            start = args[1] if len(args) > 1 else kwargs.get("start", 0)
            if not isinstance(start, int | float):
                raise SecurityError("it sums up what are no numbers")
        elif name == "indent":
            width = args[0] if args else kwargs.get("width", 4)
            wide = len(width) if isinstance(width, str) else int(width)
            budget.allow(len(str(value)) + (str(value).count("\n") + 1) * wide)
        elif name in ("tojson", "string", "urlencode"):
            budget.allow(budget.weigh(value))
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(kind or "", ())
        return context.environment.built(context, function(*first, value, *args, **kwargs))

    # functools.wraps copied which argument `function` wants; the wrapper wants the context.
    return pass_context(priced)


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """What `{{ value }}` writes, paid for before it is turned into text."""
    budget: Budget = context.budget
    size = budget.weigh(value)
    budget.written += size
    if budget.written > 16 * budget.size:
        raise SecurityError(f"it writes more than {16 * budget.size} characters")
    budget.allow(size)
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(value, Undefined):
        raise TemplateRuntimeError("it writes an undefined value as JSON")
    check_width(indent, len(indent) if isinstance(indent, str) else 0)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class RefusedMessages(TemplateRuntimeError):
    """A template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise RefusedMessages(str(message)[:2_000])


def _strftime_now(format: str) -> str:
    if len(format) > 200 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise SecurityError("it formats the time with a width")
    return datetime.now().strftime(format)


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """jinja2's namespace without names that Python gives a meaning, and with a short text."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: B902
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name[:40]!r}")
