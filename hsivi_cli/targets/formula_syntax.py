"""Reading a model formula safely: formulae's scanner and parser, with positions, and every name checked before use.

formulae itself looks names up in the caller's Python, follows dots into modules, and stops silently at the first
token it cannot use. Here a formula may name columns and the functions listed below, nothing else, and must be read to
its end.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from formulae.expr import Assign, Binary, Call, Grouping, Literal, QuotedName, Unary, Variable
from formulae.parser import ParseError, Parser
from formulae.scanner import ScanError, Scanner

from hsivi_cli.errors import InputError


def _inverse_logit(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _logit(x: Any) -> Any:
    return np.log(x) - np.log1p(-x)


FUNCTIONS: dict[str, Any] = {
    **{
        name: getattr(np, name)
        for name in (
            "log", "log2", "log10", "log1p", "exp", "expm1", "sqrt", "abs", "square", "sign", "floor", "ceil",
            "sin", "cos", "tan", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "arcsinh",
        )
    },
    "logit": _logit,
    "inv_logit": _inverse_logit,
}  # fmt: skip
TWO_ARGUMENTS: dict[str, Any] = {"minimum": np.minimum, "maximum": np.maximum, "arctan2": np.arctan2}
CATEGORIES = ("C", "S", "T", "binary", "B")
PROPORTIONS = ("p", "prop", "proportion")
# formulae's own, with the keyword arguments that may be given
LIBRARY: dict[str, tuple[str, ...]] = {
    "I": (), "offset": (), "center": (), "scale": (), "standardize": (),
    "C": ("contrast", "levels"), "T": ("ref", "levels"), "S": ("omit", "levels"), "binary": ("success",),
    "B": ("success",), "p": (), "prop": (), "proportion": (),
    "bs": ("df", "knots", "degree", "intercept", "lower_bound", "upper_bound"), "poly": ("degree", "raw"),
}  # fmt: skip
CONTRASTS = ("Treatment", "Sum")
_SHOWN = 240  # characters of a formula in a message
_OPERATORS_IN_CALLS = ("STAR", "SLASH", "STAR_STAR", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL", "EQUAL_EQUAL",
                       "BANG_EQUAL")  # fmt: skip


@dataclass(frozen=True)
class Syntax:
    """A checked formula: its syntax tree, the columns it names, and those it takes as categories or counts."""

    text: str
    tree: Binary
    columns: tuple[str, ...]
    whole: tuple[str, ...]

    def fail(self, message: str, node: Any = None) -> InputError:
        """An InputError that quotes the formula with the place of `node` marked."""
        return _complaint(self.text, message, _position(node))


class _Scanner(Scanner):
    """formulae's scanner, with the place of each token kept on it."""

    def add_token(self, kind: str, literal: Any = None) -> None:
        super().add_token(kind, literal)
        self.tokens[-1].span = (self.start, self.current)


def parse_formula(text: str, columns: Sequence[str]) -> Syntax:
    """Parse `text` against the names in `columns`; raises InputError that marks the spot as >>...<<."""
    if not text.strip():
        raise InputError('the formula is empty: write one as "y ~ x + z"')
    scanner = _Scanner(text)
    try:
        tokens = scanner.scan()
    except ScanError as err:
        if "'~'" in str(err):
            raise _complaint(text, 'there is more than one "~"', None) from err
        hint = ": a power is written I(x ** 2)" if "^" in str(err) else ""
        raise _complaint(text, f"unexpected character{hint}", (scanner.start, scanner.current)) from err
    except IndexError as err:
        raise _complaint(text, "a backquote is not closed", (scanner.start, len(text))) from err
    if not any(token.kind == "TILDE" for token in tokens):
        raise _complaint(text, 'there is no "~": write response ~ predictors', None)
    parser = Parser(tokens)
    try:
        tree = parser.parse()
    except ParseError as err:
        message = str(err).rstrip(".") if str(err).startswith("Expect") else "this was not understood"
        raise _complaint(text, message.replace("Expect ", "expected "), _token_span(parser, text)) from err
    except RecursionError as err:
        raise InputError("the formula is nested too deeply") from err
    if not parser.at_end():
        hint = ": put group effects in brackets, (1 | g)" if parser.peek().kind == "PIPE" else ""
        raise _complaint(text, f"this does not belong here{hint}", _token_span(parser, text))
    if not isinstance(tree, Binary) or tree.operator.kind != "TILDE":
        raise _complaint(text, 'write response ~ predictors, with "~" outside every bracket', None)
    walker = _Walker(text, tuple(columns))
    if not isinstance(tree.left, Variable | Call | QuotedName):
        raise _complaint(text, "the response must be one column or one function of columns", _position(tree.left))
    try:
        walker.check(tree.left, inside_call=False)
        walker.check(tree.right, inside_call=False)
    except RecursionError as err:
        raise InputError("the formula is nested too deeply") from err
    return Syntax(text, tree, tuple(dict.fromkeys(walker.named)), tuple(dict.fromkeys(walker.whole)))


def children(node: Any) -> list[Any]:
    """The nodes right below one, from left to right."""
    if isinstance(node, Binary):
        return [node.left, node.right]
    if isinstance(node, Unary):
        return [node.right]
    if isinstance(node, Grouping):
        return [node.expression]
    if isinstance(node, Call):
        return list(node.args)
    return [node.value] if isinstance(node, Assign) else []


def walk(node: Any) -> Iterator[Any]:
    """All nodes of a syntax tree, the root first."""
    waiting = [node]  # a formula of a thousand columns is a thousand levels deep
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(children(node))


def addends(node: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """`a + b - c` as a and [(+, b), (-, c)]: the tree leans to the left, a level for each operator."""
    rest = []
    while isinstance(node, Binary) and node.operator.kind in ("PLUS", "MINUS"):
        rest.append((node.operator, node.right))
        node = node.left
    return node, rest[::-1]


def unparse(node: Any) -> str:
    """An expression as text, brackets kept (formulae's own names of terms lose them)."""
    if isinstance(node, Binary):
        first, rest = addends(node)
        if rest:
            return " ".join([unparse(first), *(f"{operator.lexeme} {unparse(part)}" for operator, part in rest)])
        return f"{unparse(node.left)} {node.operator.lexeme} {unparse(node.right)}"
    if isinstance(node, Unary):
        return f"{node.operator.lexeme}{unparse(node.right)}"
    if isinstance(node, Grouping):
        return f"({unparse(node.expression)})"
    if isinstance(node, Assign):
        return f"{node.name.name.lexeme}={unparse(node.value)}"
    if isinstance(node, Call):
        return f"{node.callee.name.lexeme}({', '.join(unparse(argument) for argument in node.args)})"
    if isinstance(node, Literal):
        return node.lexeme if node.lexeme is not None else str(node.value)
    if isinstance(node, QuotedName):
        return str(node.expression.lexeme)[1:-1]
    return str(node.name.lexeme)


class _Walker:
    """Checks every node, and collects the columns that are named."""

    def __init__(self, text: str, columns: tuple[str, ...]) -> None:
        self.text, self.columns, self.known = text, columns, frozenset(columns)
        self.named: list[str] = []
        self.whole: list[str] = []

    def check(self, node: Any, inside_call: bool) -> None:
        if isinstance(node, Variable | QuotedName):
            self._column(node)
        elif isinstance(node, Literal):
            if not inside_call and (isinstance(node.value, bool | str) or node.value not in (0, 1)):
                self._fail(f"{unparse(node)} is no predictor: arithmetic goes into I(...)", node)
        elif isinstance(node, Grouping):
            self.check(node.expression, inside_call)
        elif isinstance(node, Unary):
            self.check(node.right, inside_call)
        elif isinstance(node, Call):
            self._call(node)
        elif isinstance(node, Binary):
            self._binary(node, inside_call)
        else:
            self._fail("this is not allowed here", node)

    def _column(self, node: Any) -> None:
        name = unparse(node)
        if name not in self.known:
            close = difflib.get_close_matches(name, self.columns, 1)
            hint = f'did you mean "{close[0]}"?' if close else f"the table has {_listed(self.columns)}"
            self._fail(f'there is no column "{name}": {hint}', node)
        self.named.append(name)
        if isinstance(node, Variable) and node.level is not None:
            self.whole.append(name)

    def _binary(self, node: Any, inside_call: bool) -> None:
        kind = node.operator.kind
        if kind in ("PLUS", "MINUS"):
            first, rest = addends(node)
            for part in (first, *(part for _, part in rest)):
                self.check(part, inside_call)
            return
        if inside_call:
            if kind not in _OPERATORS_IN_CALLS:
                self._fail(f'"{node.operator.lexeme}" has no meaning inside a function', node)
            if kind == "STAR_STAR" and isinstance(node.left, Unary):
                self._fail("which comes first is unclear: write -(x ** 2) or (-x) ** 2", node)
        elif kind == "STAR_STAR" and not isinstance(node.left, Grouping):
            self._fail("outside a function ** means interactions: write I(x ** 2)", node)
        elif kind == "STAR_STAR":
            if not isinstance(node.right, Literal) or node.right.value not in (1, 2, 3, 4):
                self._fail("interactions go to order 4 at most, as in (a + b) ** 2", node)
            self.check(node.left, inside_call)
            return
        elif kind not in ("STAR", "SLASH", "COLON", "PIPE"):
            self._fail(f'"{node.operator.lexeme}" has no meaning here: arithmetic goes into I(...)', node)
        self.check(node.left, inside_call)
        self.check(node.right, inside_call)
        if kind == "PIPE":
            self.whole += [unparse(n) for n in walk(node.right) if isinstance(n, Variable | QuotedName)]

    def _call(self, node: Any) -> None:
        if not isinstance(node.callee, Variable):
            self._fail("only a function's name can be called", node)
        name = node.callee.name.lexeme
        positional = [argument for argument in node.args if not isinstance(argument, Assign)]
        keywords = [argument for argument in node.args if isinstance(argument, Assign)]
        if name in FUNCTIONS or name in TWO_ARGUMENTS:
            wanted = 1 if name in FUNCTIONS else 2
            if len(node.args) != wanted or keywords:
                self._fail(f"{name} takes {wanted} argument{'s' if wanted > 1 else ''}", node.callee)
        elif name not in LIBRARY:
            known = (*FUNCTIONS, *TWO_ARGUMENTS, *LIBRARY)
            close = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            self._fail(f'there is no function "{name}": {hint}', node.callee)
        elif not positional:
            self._fail(f"{name} needs a column", node.callee)
        for argument in keywords:
            if argument.name.name.lexeme not in LIBRARY[name]:
                self._fail(f"{name} has no argument {argument.name.name.lexeme}", argument.name)
        for argument in positional + [keyword.value for keyword in keywords]:
            # C(x, Treatment): the name of a contrast, not of a column
            if not (name == "C" and isinstance(argument, Variable) and argument.name.lexeme in CONTRASTS):
                self.check(argument, inside_call=True)
        if name in (*CATEGORIES, *PROPORTIONS):
            self.whole += [unparse(n) for n in walk(node) if isinstance(n, Variable | QuotedName)]

    def _fail(self, message: str, node: Any) -> None:
        raise _complaint(self.text, message, _position(node))


def _complaint(text: str, message: str, span: tuple[int, int] | None) -> InputError:
    if span is None:
        return InputError(f'formula "{shortened(" ".join(text.split()))}": {message}')
    start, end = span
    before, after = text[:start], text[end:]
    before = before if len(before) <= _SHOWN // 2 else "..." + before[-_SHOWN // 2 :]
    after = after if len(after) <= _SHOWN // 2 else after[: _SHOWN // 2] + "..."
    marked = f"{before}>>{shortened(text[start:end])}<<{after}"
    return InputError(f'formula "{" ".join(marked.split())}": {message}')


def shortened(text: str) -> str:
    """The beginning and the end of a text that is too long for a line."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _token_span(parser: Any, text: str) -> tuple[int, int]:
    return getattr(parser.peek(), "span", (len(text), len(text)))


def _position(node: Any) -> tuple[int, int] | None:
    """From the first to the last token below a node that has a place."""
    if node is None:
        return None
    spans = []
    for inner in walk(node):
        for token in (getattr(inner, name, None) for name in ("name", "operator", "expression")):
            if token is not None and hasattr(token, "span"):
                spans.append(token.span)
        if isinstance(inner, Call) and isinstance(inner.callee, Variable):
            spans.append(inner.callee.name.span)
    return (min(a for a, _ in spans), max(b for _, b in spans)) if spans else None


def _listed(names: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(str(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
