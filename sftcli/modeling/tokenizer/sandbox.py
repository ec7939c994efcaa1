"""The sandbox in which chat templates run: Jinja as transformers sets it up, with a budget on all that can repeat.

Jinja's own sandbox keeps a template from files and from Python's insides, but lets it loop and grow without end.
"""

import json
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from time import monotonic
from typing import cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from sftcli.modeling.tokenizer.growth import growth_of

FIXED_DATE = date(2025, 1, 1)
MAX_ITERATIONS = 1_000_000
MAX_SECONDS = 10.0
MAX_COUNT = 1_000_000  # widths, repetitions and numbers that a template may ask for
MAX_POWER = 64
MAX_BITS = 4096  # of a number
ITERATIONS_PER_LOOK = 64
MAX_NODES = 1_000_000  # values inside of one that is printed, compared or looked up
MADE_PER_OUTPUT = 100  # times the output that a rendering may make of texts and lists on its way
LIST_ITEM_CHARS = 16  # what an item of a list counts beside the characters of texts
_SCALARS = frozenset({str, int, bool, float, type(None), Undefined})
_LEAVES = frozenset({int, bool, float, type(None)})
_COLLECTIONS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_LOOP_PLACES = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length"})


@dataclass(slots=True)
class Budget:
    """What one rendering may still use; ``deadline`` is on the monotonic clock."""

    output_chars: int
    deadline: float
    iterations: int = MAX_ITERATIONS
    made_chars: int = 0  # so far

    def spend(self) -> None:
        """Pay for one round of a loop or one call."""
        self.iterations -= 1
        if self.iterations < 0:
            raise SecurityError(f"the template loops more than {MAX_ITERATIONS} times")
        if self.iterations % ITERATIONS_PER_LOOK == 0:
            self.look()

    def look(self) -> None:
        """See that there is time left."""
        if monotonic() > self.deadline:
            raise SecurityError(f"the template runs longer than {MAX_SECONDS:.0f} seconds")

    def make(self, chars: int) -> None:
        """Pay for a value of ``chars``, which the template may keep."""
        self.made_chars += chars
        if self.made_chars > MADE_PER_OUTPUT * self.output_chars:
            raise SecurityError("the template builds more than its output may ever need")


budget: ContextVar[Budget] = ContextVar("budget")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with a budget on everything that can repeat."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, made) for name, made in self.filters.items()}
        self.filters |= {"_counted": _counted, "_sized": _sized, "_added": _added, "_walked": _walked}
        self.tests |= {
            name: _comparing(cast("Callable[..., object]", self.tests[name])) for name in _COMPARISONS
        }
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
        if type(obj) is not Macro:  # whose body pays for itself
            for value in (*args, *kwargs.values()):
                _walked(value)
            method = getattr(obj, "__wrapped__", obj)
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str):
                _check_growth(getattr(method, "__name__", ""), (owner, *args), kwargs)
            elif isinstance(owner, _COLLECTIONS):  # which looks for what it is asked for
                _walked(owner)
        return _sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Apply one of the operators that can make something large from something small."""
        if operator in ("*", "**"):
            _check_repetition(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            _walked(right)
            _check_growth("%", (left, right), {})
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
    """Puts the filters that pay for what they give or walk through around loops, sums, texts, comparisons and keys."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _filtered("_counted", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        node.nodes = [_walking(part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        node.nodes = [_walking(part) for part in node.nodes]
        return _filtered("_sized", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802 (Jinja goes by the name)
        """Leave comparisons with a literal alone: it is as cheap as the literal is short."""
        self.generic_visit(node)
        sides = (node.expr, *(operand.expr for operand in node.ops))
        if len(sides) > 2 or not any(isinstance(side, nodes.Const) for side in sides):
            node.expr = _walking(node.expr)
            for operand in node.ops:
                operand.expr = _walking(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # a copy
            return _filtered("_sized", node) if node.ctx == "load" else node
        assert isinstance(node.arg, nodes.Expr)
        node.arg = _walking(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:  # noqa: N802 (Jinja goes by the name)
        self.generic_visit(node)
        node.key = _walking(node.key)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:  # noqa: N802 (Jinja goes by the name)
        """Make one call of ``a + b + c``, which templates use to assemble messages."""
        terms, first = [node.right], node.left
        while isinstance(first, nodes.Add):
            terms, first = [first.right, *terms], first.left
        return _filtered("_added", *(self.visit(term) for term in (first, *terms)))


def _walking(node: nodes.Expr) -> nodes.Expr:
    """Return an expression whose value is walked through, where it may be more than a short text or a number."""
    return (
        node
        if isinstance(node, nodes.Literal) and not isinstance(node, _BUILT)
        else _filtered("_walked", node)
    )


_BUILT = (nodes.List, nodes.Tuple, nodes.Dict)  # literals of what is inside


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
    """Return ``value`` where it is no longer than the whole output may be; it is paid for."""
    if type(value) is str:  # first, because it is nearly all there is
        size = chars = len(value)
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise SecurityError("the template builds a number that is too large")
        return value
    elif isinstance(value, str | bytes | list | tuple | dict):
        size = len(value)
        chars = size if isinstance(value, str | bytes) else LIST_ITEM_CHARS * size
    else:
        return value
    left = budget.get()
    if size > left.output_chars:
        raise SecurityError("the template builds a value larger than its output may be")
    left.make(chars)
    return value


def _walked(value: object) -> object:
    """Return ``value`` where whoever prints, compares or looks it up is done with it soon.

    What is inside of it counts as often as it is there: a list of twice the same list, forty times over, takes no room.
    """
    if type(value) in _SCALARS:
        return value
    left = budget.get()
    heap, nodes_left, chars_left = [value], MAX_NODES, left.output_chars
    while heap:
        item = heap.pop()
        if isinstance(item, str):
            chars_left -= len(item)
            if chars_left < 0:
                raise SecurityError("the template handles a value larger than its output may be")
        elif type(item) not in _LEAVES and (inside := _inside(item)):
            nodes_left -= len(inside)
            if nodes_left < 0:
                raise SecurityError(f"the template handles a value of more than {MAX_NODES} parts")
            heap += inside
    if nodes_left < MAX_NODES - ITERATIONS_PER_LOOK:
        left.look()
    return value


def _settled(value: object) -> object:
    """Return ``value`` walked through; what would give its items one by one gives them now."""
    return _walked(list(_counted(value)) if isinstance(value, Iterator) else value)


def _inside(value: object) -> Collection[object]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, _COLLECTIONS):
        return value
    if isinstance(value, Namespace):
        return list(object.__getattribute__(value, "_Namespace__attrs").values())
    return ()


def _concat(pieces: Iterable[str]) -> str:
    left = budget.get()
    limit = left.output_chars
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > limit:
            raise SecurityError(f"the template outputs more than {limit} characters")
    left.make(size)
    return "".join(kept)


def _check_repetition(operator: str, left: object, right: object) -> None:
    for count, value in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            _check_count(count * max(len(value), 1))
    if operator == "**" and isinstance(right, int | float) and abs(right) > MAX_POWER:
        raise SecurityError("the template raises a number to too large a power")


def _check_growth(name: str, given: Sequence[object], named: Mapping[str, object]) -> None:
    """Refuse a call that makes a long text of short ones, before it does."""
    if growth_of(name, given, named) > budget.get().output_chars:
        raise SecurityError("the template builds a value larger than its output may be")


def _check_count(value: object) -> None:
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        raise SecurityError(f"the template asks for {value} of something, more than {MAX_COUNT}")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the template stores the private name {name!r}")


def _guarded(name: str, wrapped: Callable[..., object]) -> Callable[..., object]:
    """Return the filter ``wrapped``, with limits on its numbers, on what it walks through and on its result."""
    walks = name not in _SHALLOW
    is_told = hasattr(wrapped, "jinja_pass_arg")  # of the context, by which its first argument is no value

    def checked(*args: object, **kwargs: object) -> object:
        for value in (*args, *kwargs.values()):
            _check_count(value)
        first, given = args[:is_told], args[is_told:]
        if walks:
            given = tuple(map(_settled, given))
            for value in kwargs.values():
                _walked(value)
        _check_growth(name, given, kwargs)
        return _sized(wrapped(*first, *given, **kwargs))

    if is_told:
        checked.jinja_pass_arg = wrapped.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


# Filters that look at the first level of a value alone, or hand its items to filters and tests that pay for themselves.
_SHALLOW = frozenset(
    {
        *("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject"),
        *("rejectattr", "reverse", "select", "selectattr", "slice"),
    }
)  # fmt: skip
_COMPARISONS = ("eq", "==", "equalto", "ne", "!=", "gt", ">", "greaterthan", "ge", ">=", "lt", "<", "lessthan", "le", "<=", "in")  # fmt: skip


def _comparing(test: Callable[..., object]) -> Callable[..., object]:
    """Return the test ``test``, which walks through both of its sides."""

    def checked(value: object, other: object) -> object:
        if type(value) not in _SCALARS and type(other) not in _SCALARS:
            _walked(value)
        _walked(other)
        return test(value, other)

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
