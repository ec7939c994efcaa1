"""The sandbox in which chat templates run: Jinja as transformers sets it up, with a budget on all that can repeat.

Jinja's own sandbox keeps a template from files and from Python's insides, but lets it loop and grow without end.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from time import monotonic
from typing import cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

FIXED_DATE = date(2025, 1, 1)
MAX_ITERATIONS = 1_000_000
MAX_SECONDS = 10.0
MAX_COUNT = 1_000_000  # widths, repetitions and numbers that a template may ask for
MAX_POWER = 64
MAX_BITS = 4096  # of a number
ITERATIONS_PER_LOOK = 64
_LOOP_PLACES = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length"})


@dataclass(slots=True)
class Budget:
    """What one rendering may still use; ``deadline`` is on the monotonic clock."""

    output_chars: int
    deadline: float
    iterations: int = MAX_ITERATIONS

    def spend(self) -> None:
        """Pay for one round of a loop or one call."""
        self.iterations -= 1
        if self.iterations < 0:
            raise SecurityError(f"the template loops more than {MAX_ITERATIONS} times")
        if self.iterations % ITERATIONS_PER_LOOK == 0 and monotonic() > self.deadline:
            raise SecurityError(f"the template runs longer than {MAX_SECONDS:.0f} seconds")


budget: ContextVar[Budget] = ContextVar("budget")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with a budget on everything that can repeat."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, made) for name, made in self.filters.items()}
        self.filters |= {"_counted": _counted, "_sized": _sized, "_added": _added}
        del self.globals["lipsum"]  # random text, and as much of it as is asked for
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = FIXED_DATE.strftime
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.concat = _concat  # type: ignore[method-assign]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounded().visit(tree)
        return bounded

    def getattr(self, obj: object, attribute: str) -> object:
        """Return an attribute as the sandbox does; those of loops, which most templates ask for, without its checks."""
        if type(obj) is LoopContext and attribute in _LOOP_PLACES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: object, /, *args: object, **kwargs: object) -> object:
        """Call a function of the template, which recursion can repeat without a loop."""
        budget.get().spend()
        for value in (*args, *kwargs.values()):
            _check_count(value)
        method = getattr(obj, "__wrapped__", obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and getattr(method, "__name__", "") in ("format", "format_map"):
            _check_widths(owner)
        return _sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Apply one of the operators that can make something large from something small."""
        if operator in ("*", "**"):
            _check_repetition(operator, left, right)
        elif operator == "%":
            _check_widths(left)
        return _sized(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """Accepts ``{% generation %}`` blocks, which mark answers for other tools and render as their content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """``dict`` without its attributes."""

    def __call__(self, *args: Mapping[str, object], **kwargs: object) -> dict[str, object]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's namespace, closed to private names."""

    def __init__(self, /, *args: Mapping[str, object], **kwargs: object) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Bounded(NodeTransformer):
    """Puts the filters that pay for what they give around loops, sums and joined texts."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _filtered("_counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        return _filtered("_sized", node)

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:  # noqa: N802 (Jinja goes by the name)
        """Make one call of ``a + b + c``, which templates use to assemble messages."""
        terms, first = [node.right], node.left
        while isinstance(first, nodes.Add):
            terms, first = [first.right, *terms], first.left
        return _filtered("_added", *(self.visit(term) for term in (first, *terms)))


def _filtered(name: str, value: nodes.Expr, *others: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(others), [], None, None, lineno=value.lineno)


def _added(first: object, *others: object) -> object:
    """Return the sum, from left to right."""
    terms = (first, *others)
    if set(map(type, terms)) == {str}:  # nearly all there is, and often
        return _sized("".join(cast("tuple[str, ...]", terms)))
    for term in others:
        first = _sized(first + term)  # type: ignore[operator]  # what cannot be added says so itself
    return first


def _counted(values: Iterable[object]) -> Iterator[object]:
    """Yield ``values``, each paid for."""
    left = budget.get()
    for value in values:
        left.spend()
        yield value


def _sized(value: object) -> object:
    """Return ``value`` where it is no longer than the whole output may be."""
    if type(value) is str:  # first, because it is nearly all there is
        too_large = len(value) > budget.get().output_chars
    elif isinstance(value, int):
        too_large = value.bit_length() > MAX_BITS
    else:
        too_large = isinstance(value, str | list | tuple) and len(value) > budget.get().output_chars
    if too_large:
        raise SecurityError("the template builds a value larger than its output may be")
    return value


def _concat(pieces: Iterable[str]) -> str:
    limit = budget.get().output_chars
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > limit:
            raise SecurityError(f"the template outputs more than {limit} characters")
    return "".join(kept)


def _check_repetition(operator: str, left: object, right: object) -> None:
    for count, value in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            _check_count(count * max(len(value), 1))
    if operator == "**" and isinstance(right, int | float) and abs(right) > MAX_POWER:
        raise SecurityError("the template raises a number to too large a power")


def _check_widths(text: object) -> None:
    if isinstance(text, str) and re.search(r"[%{][^%{}]*([0-9]{6}|\*)", text):
        raise SecurityError("the template formats with a width that is too large")


def _check_count(value: object) -> None:
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        raise SecurityError(f"the template asks for {value} of something, more than {MAX_COUNT}")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the template stores the private name {name!r}")


def _guarded(name: str, wrapped: Callable[..., object]) -> Callable[..., object]:
    """Return the filter ``wrapped``, with limits on its numbers and its result."""

    def checked(*args: object, **kwargs: object) -> object:
        for value in (*args, *kwargs.values()):
            _check_count(value)
        if name == "format":
            _check_widths(args[0])
        return _sized(wrapped(*args, **kwargs))

    if hasattr(wrapped, "jinja_pass_arg"):  # how Jinja knows that a filter wants its context
        checked.jinja_pass_arg = wrapped.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
