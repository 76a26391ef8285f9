"""Design matrices of a model formula, through the `formulae` library (names of terms and contrasts are its own)."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from formulae.environment import Environment
from formulae.expr import Binary, QuotedName
from formulae.expr import Call as Call_
from formulae.expr import Variable as Variable_
from formulae.matrices import DesignMatrices
from formulae.resolver import Resolver
from formulae.terms import Call as CallTerm
from formulae.terms import Intercept, Model, Term, Variable
from formulae.terms.call_resolver import CallResolver
from jaxtyping import Float64, Int64

from hsivi_cli.errors import InputError
from hsivi_cli.targets.formula_syntax import (
    FUNCTIONS,
    TWO_ARGUMENTS,
    Syntax,
    addends,
    children,
    parse_formula,
    unparse,
    walk,
)

if TYPE_CHECKING:
    import pandas

MOST_LEVELS = 200  # categories of one predictor; more are almost surely an identifier


@dataclass(frozen=True)
class GroupBlock:
    """Effects that vary together between the levels of `factor`: `terms` (q names), `values` (N, q), `index` (N,).

    One block for each bracket of the formula, so `(x | g)` is one block of two correlated terms, and
    `(1 | g) + (0 + x | g)` are two blocks.
    """

    factor: str
    terms: tuple[str, ...]
    levels: tuple[str, ...]
    index: Int64[np.ndarray, " N"]
    values: Float64[np.ndarray, "N q"]


@dataclass(frozen=True)
class Design:
    """What a formula says about a table of N rows: response `y`, predictors `X` without the intercept, and the rest.

    `levels` are the two categories that y = 0 and y = 1 stand for, where the response is text; `trials` those of
    `p(y, n)`. `offset` is zero where there is none.
    """

    formula: str
    response: str
    y: Float64[np.ndarray, " N"]
    levels: tuple[str, str] | None
    trials: Float64[np.ndarray, " N"] | None
    intercept: bool
    names: tuple[str, ...]
    X: Float64[np.ndarray, "N p"]
    offset: Float64[np.ndarray, " N"]
    groups: tuple[GroupBlock, ...]


def default_formula(columns: Sequence[str]) -> str:
    """The last column on all others."""
    if len(columns) < 2:
        raise InputError("the table has one column only: without --formula the last column is modelled by the others")
    quoted = [name if name.isidentifier() and name.isascii() else f"`{name}`" for name in columns]
    if any("`" in name for name in columns):
        raise InputError("a column's name holds a backquote: rename it")
    return f"{quoted[-1]} ~ {' + '.join(quoted[:-1])}"


def formula_columns(formula: str | None, frame: "pandas.DataFrame") -> tuple[str, ...]:
    """The columns that a formula uses; all of them without a formula."""
    columns = [str(name) for name in frame.columns]
    return parse_formula(formula or default_formula(columns), columns).columns


def build_design(formula: str, frame: "pandas.DataFrame") -> Design:
    """Evaluate a formula on a table without missing values; raises InputError naming the term at fault."""
    syntax = parse_formula(formula, [str(name) for name in frame.columns])
    data = _prepared(frame, syntax)
    environment = Environment([{**FUNCTIONS, **TWO_ARGUMENTS}])
    try:
        with _quiet():
            description = _Resolver(syntax.tree).resolve()
            model = description if isinstance(description, Model) else Model(description)
            blocks = _group_blocks(model, syntax, data, environment)
            model.group_terms = []
            design = DesignMatrices(model, data, environment)
            y, levels, trials = _response(design, data, syntax)
            names, X, offset = _common(design, len(data), syntax)
    except InputError:
        raise
    except MemoryError as err:
        raise syntax.fail(
            "the design matrix does not fit into memory: leave out predictors of many categories"
        ) from err
    except Exception as err:  # formulae raises whatever pandas, numpy or its own asserts do
        reason = (str(err).splitlines() or [type(err).__name__])[0][:160]
        raise syntax.fail(f"could not be evaluated ({type(err).__name__}: {reason})") from err
    response_name = unparse(syntax.tree.left)
    if response_name in names:
        raise syntax.fail(f'the response "{response_name}" is also a predictor', syntax.tree.right)
    intercept = any(isinstance(term, Intercept) for term in model.common_terms)
    if not intercept and not names and not blocks:
        raise syntax.fail("there is nothing to estimate: name a predictor, or write 1 for an intercept")
    return Design(syntax.text, response_name, y, levels, trials, intercept, names, X, offset, blocks)


class _Call(CallTerm):
    """A function term that equals another by its text; formulae's comparison fails on log(sqrt(x)) + log(x)."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


class _Resolver(Resolver):
    """formulae's resolver, with names of function terms that keep their brackets, and long sums in linear time."""

    def visitBinaryExpr(self, expr: Any) -> Any:
        first, rest = addends(expr)
        if not rest:
            return super().visitBinaryExpr(expr)
        total = first.accept(self)
        known: set[Term] | None = None  # the terms in `total`, while only terms are added
        for operator, node in rest:
            part = node.accept(self)
            if operator.kind == "PLUS" and isinstance(total, Model) and isinstance(part, Term):
                # formulae's own addition compares a term with each one before it
                if known is None:
                    known = {term for term in total.common_terms if isinstance(term, Term)}
                if part not in known:
                    known.add(part)
                    total.common_terms.append(part)
            else:
                known = None
                total = total + part if operator.kind == "PLUS" else total - part
        return total

    def visitCallExpr(self, expr: Any) -> Any:
        call = _Call(CallResolver(expr).resolve())
        call.name = unparse(expr)
        return Term(call)


def _prepared(frame: "pandas.DataFrame", syntax: Syntax) -> "pandas.DataFrame":
    """The columns in use: numbers as float64 (no overflow in powers), text as sorted categories, all checked."""
    import pandas as pd

    columns = {}
    for name in _category_predictors(syntax, frame):
        if (count := frame[name].nunique()) > MOST_LEVELS:  # refused before a column a category is laid out
            raise InputError(
                f'the predictor "{name}" has {count} categories: leave it out, or make it a group effect, (1 | {name})'
            )
    for name in syntax.columns:
        column = frame[name]
        if column.isna().any():
            raise InputError(f'column "{name}" has missing values: fill them in, or drop these rows with --na drop')
        if isinstance(column.dtype, pd.CategoricalDtype):
            columns[name] = column.cat.remove_unused_categories().cat.as_ordered().reset_index(drop=True)
        elif pd.api.types.is_bool_dtype(column) or pd.api.types.is_numeric_dtype(column):
            if np.iscomplexobj(column):
                raise InputError(f'column "{name}" holds complex numbers')
            values = column.to_numpy(np.float64)
            if name not in syntax.whole:
                columns[name] = pd.Series(values)
            elif column.dtype.kind in "biu":
                columns[name] = column.reset_index(drop=True)
            else:  # whole numbers beside gaps come as floats
                whole = np.isfinite(values).all() and (np.abs(values) < 2**53).all() and (values % 1 == 0).all()
                columns[name] = pd.Series(values.astype(np.int64) if whole else values)
        elif pd.api.types.is_string_dtype(column) or column.dtype == object:
            columns[name] = _categories(column, dates=name in syntax.whole).reset_index(drop=True)
        else:
            raise InputError(f'column "{name}" holds {column.dtype}, neither numbers nor text: convert it first')
    return pd.DataFrame(columns)


def _category_predictors(syntax: Syntax, frame: "pandas.DataFrame") -> set[str]:
    """Columns that become categories in a predictor: text, and what is inside C() and its like."""
    import pandas as pd

    def visit(node: Any, categories: bool) -> Iterator[str]:
        first, rest = addends(node)
        if rest:
            for part in (first, *(part for _, part in rest)):
                yield from visit(part, categories)
            return
        if isinstance(node, Variable_ | QuotedName):
            name = unparse(node)
            if name in frame.columns and (categories or not pd.api.types.is_numeric_dtype(frame[name])):
                yield name
            return
        grouping = isinstance(node, Binary) and node.operator.kind == "PIPE"
        inside = isinstance(node, Call_) and node.callee.name.lexeme in ("C", "S", "T")
        for child in children(node)[:1] if grouping else children(node):
            yield from visit(child, categories or inside)

    return set(visit(syntax.tree.right, False))


def _categories(column: "pandas.Series", dates: bool) -> "pandas.Series":
    """Text as ordered categories, whole numbers in numeric order; dates only where the formula asks for categories.

    Refuses numbers with stray text, which would make a category of each number.
    """
    import datetime

    import pandas as pd

    if not dates and isinstance(column.iloc[0], datetime.date | datetime.time):
        raise InputError(
            f'column "{column.name}" holds dates: turn them into numbers, as days since the first, '
            f"or write C({column.name}) for a category each"
        )
    text = column.astype(str)
    values = pd.Series(pd.unique(text))
    numeric = pd.to_numeric(values, errors="coerce")
    numbers = numeric.notna()
    if numbers.all():
        ordered = [str(value) for _, value in sorted(zip(numeric, values, strict=True))]
    elif numbers.sum() > len(values) / 2:
        bad = str(values[~numbers].iloc[0])
        row = int((text == bad).to_numpy().argmax()) + 1
        raise InputError(
            f'column "{column.name}" holds numbers, but "{bad}" in row {row}: '
            "mend it, or leave it empty and use --na drop"
        )
    else:
        ordered = sorted(str(value) for value in values)
    return pd.Series(pd.Categorical(text, categories=ordered, ordered=True), name=column.name)


def _response(
    design: DesignMatrices, data: "pandas.DataFrame", syntax: Syntax
) -> tuple[np.ndarray, tuple[str, str] | None, np.ndarray | None]:
    response = design.response
    if response is None:
        raise syntax.fail("there is no response")
    values = np.asarray(response.design_matrix)
    if response.kind == "proportion":
        return values[:, 0].astype(np.float64), None, values[:, 1].astype(np.float64)
    if response.kind == "categoric":
        component = response.term.term.components[0]
        reference = getattr(component, "reference", None)
        if reference is not None:
            if reference not in component.levels:
                raise syntax.fail(f'the response has no category "{reference}"', syntax.tree.left)
            return values.astype(np.float64).reshape(-1), (f"not {reference}", str(reference)), None
        levels = [str(level) for level in component.levels]
        if len(levels) != 2:
            raise InputError(
                f'the response "{response.name}" is text with {len(levels)} categories, and needs two: '
                f'choose one, as in {response.name}["{levels[-1]}"] ~ ...'
            )
        return values[:, 1].astype(np.float64), (levels[0], levels[1]), None
    y = values.astype(np.float64).reshape(len(data), -1)
    if y.shape[1] != 1:
        raise syntax.fail("the response must be one number a row", syntax.tree.left)
    return y[:, 0], None, None


def _common(
    design: DesignMatrices, rows: int, syntax: Syntax
) -> tuple[tuple[str, ...], Float64[np.ndarray, "N p"], Float64[np.ndarray, " N"]]:
    """Names and columns of the population-level predictors, and the sum of the offsets."""
    names: dict[str, None] = {}
    columns: list[np.ndarray] = []
    offset = np.zeros(rows)
    for term in design.model.common_terms:
        if isinstance(term, Intercept):
            continue
        values = np.asarray(term.data, np.float64).reshape(rows, -1)
        if term.kind == "offset":
            _check_finite(values, (term.name,), syntax)
            offset = offset + values[:, 0]
            continue
        labels = [str(label) for label in term.labels]
        _check_finite(values, labels, syntax)
        if twice := [label for label in labels if label in names]:
            raise syntax.fail(f'two predictors are named "{twice[0]}"')
        names |= dict.fromkeys(labels)
        columns.append(values)
    return tuple(names), np.concatenate([np.empty((rows, 0)), *columns], 1), offset


def _group_blocks(
    model: Model, syntax: Syntax, data: "pandas.DataFrame", environment: Environment
) -> tuple[GroupBlock, ...]:
    """The group effects; formulae's own matrix would have a dense column for each level, so only its terms are used."""
    blocks: list[GroupBlock] = []
    wanted = {term.name for term in model.group_terms}
    brackets = [n for n in walk(syntax.tree) if getattr(getattr(n, "operator", None), "kind", "") == "PIPE"]
    for bracket in brackets:
        by_factor: dict[str, list[Any]] = {}
        found = _Resolver(bracket).resolve()  # a single term comes bare
        for term in found.group_terms if isinstance(found, Model) else [found]:
            if term.name in wanted:  # one that is named twice counts once, in its first bracket
                wanted.discard(term.name)
                by_factor.setdefault(term.factor.name, []).append(term)
        for factor, terms in by_factor.items():
            if not all(isinstance(component, Variable) for component in terms[0].factor.components):
                raise syntax.fail("what groups must be columns, not functions of them", bracket)
            codes, levels = _levels([data[component.name] for component in terms[0].factor.components])
            if len(levels) < 2:
                raise syntax.fail(f'all rows are in one group of "{factor}": leave that group effect out', bracket)
            with_intercept = any(isinstance(term.expr, Intercept) for term in terms)
            names: list[str] = []
            values: list[np.ndarray] = []
            for term in terms:
                term.expr.set_type(data, environment)
                term.expr.set_data(not with_intercept and not isinstance(term.expr, Intercept))
                column = np.asarray(term.expr.data, np.float64).reshape(len(data), -1)
                labels = ["Intercept"] if isinstance(term.expr, Intercept) else [str(lab) for lab in term.expr.labels]
                _check_finite(column, labels, syntax)
                names += labels
                values.append(column)
            blocks.append(
                GroupBlock(
                    factor, tuple(names), levels, codes, np.concatenate(values, 1),
                )
            )  # fmt: skip
    return tuple(blocks)


def _levels(parts: Sequence["pandas.Series"]) -> tuple[Int64[np.ndarray, " N"], tuple[str, ...]]:
    """Codes and names of the groups that columns make up, sorted by the first column, then the second, ...

    Numbers are in numeric order and categories in their own.
    """
    import pandas as pd

    codes, names = np.zeros(len(parts[0]), np.int64), [""]
    for part in parts:
        if isinstance(part.dtype, pd.CategoricalDtype):
            inner, labels = part.cat.codes.to_numpy(np.int64), list(part.cat.categories)
        else:
            values, inner = np.unique(part.to_numpy(), return_inverse=True)
            labels = list(values)
        crossed = codes * len(labels) + inner
        present, codes = np.unique(crossed, return_inverse=True)
        names = [
            f"{names[outer]}:{labels[own]}" if names[outer] else str(labels[own])
            for outer, own in zip(*np.divmod(present, len(labels)), strict=True)
        ]
    return codes.astype(np.int64), tuple(names)


def _check_finite(values: np.ndarray, labels: Sequence[str], syntax: Syntax) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        shown = "not a number" if np.isnan(values[row, column]) else "infinite"
        raise syntax.fail(f'"{labels[min(column, len(labels) - 1)]}" is {shown} in row {row + 1}')


@contextlib.contextmanager
def _quiet() -> Any:
    """formulae prints and logs where it fails; numpy warns of logarithms of negative numbers, which are refused."""
    logger = logging.getLogger("formulae")
    disabled, logger.disabled = logger.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
