"""Formulas name columns and known functions only; errors mark the spot; nothing is evaluated on the way."""

import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.targets.formula_syntax import parse_formula, unparse

COLUMNS = ("y", "x", "z", "mom_iq", "g", "h", "n", "my col", "a.b")


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("y ~ x + z", ["y", "x", "z"]),
        ("log(y) ~ log(x*z) + sqrt(mom_iq)", ["y", "x", "z", "mom_iq"]),
        ("p(y, n) ~ x + (x | g)", ["y", "n", "x", "g"]),
        ("y ~ `my col` + a.b", ["y", "my col", "a.b"]),
        ("y ~ (x + z) ** 2 + I(x ** 2) + {z / 2}", ["y", "x", "z"]),
        ("y ~ T(g, ref='b') + C(h, Sum) + bs(x, df=4)", ["y", "g", "h", "x"]),
    ],
)
def test_the_columns_of_a_formula(text, columns):
    assert list(parse_formula(text, COLUMNS).columns) == columns


@pytest.mark.parametrize(
    ("text", "spot", "words"),
    [
        ("y ~ mom_qi", ">>mom_qi<<", 'did you mean "mom_iq"?'),
        ("y ~ x + nothing", ">>nothing<<", 'no column "nothing"'),
        ("y ~ x +", ">><<", "not understood"),
        ("y ~ x z", ">>z<<", "does not belong here"),
        ("y ~ x | g", ">>|<<", "brackets"),
        ("y ~ (x", ">><<", "expected ')'"),
        ("y ~ x^2", ">>^<<", "I(x ** 2)"),
        ("y ~ x**2", ">>x**<<", "I(x ** 2)"),
        ("y ~ I(-x**2)", ">>-x**<<", "unclear"),
        ("y ~ 2*x", "2*x", "arithmetic goes into I"),
        ("y ~ lgo(x)", ">>lgo<<", "did you mean log?"),
        ("y ~ log(x, z)", ">>log<<", "takes 1 argument"),
        ("y ~ log(x, out=y)", ">>log<<", "takes 1 argument"),
        ("y ~ bs(x, dff=3)", ">>dff<<", "no argument dff"),
        ("y ~ `x", ">>`x<<", "not closed"),
        ("y", "y", 'no "~"'),
        ("y ~ x ~ z", "", 'more than one "~"'),
        ("~ x", ">>~<<", "not understood"),
        ("y + x ~ z", ">>y + x<<", "the response must be"),
        ("", "", "empty"),
    ],
)
def test_errors_mark_the_spot(text, spot, words):
    with pytest.raises(InputError) as caught:
        parse_formula(text, COLUMNS)
    assert spot in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "y ~ __import__('os').system('true')",
        "y ~ eval('1')",
        "y ~ np.log(x)",
        "y ~ x.__class__",
        "y ~ a.b.__class__",
        "y ~ log.__class__(x)",
        "y ~ getattr(x, 'a')",
        "y ~ open('f')",
        "y ~ pd.read_pickle('f')",
        "y ~ (log)(x)",
        "y ~ log(x)(z)",
        "y ~ C(x, eval)",
        "y ~ C(x, contrast=eval)",
        "y ~ I(x, __class__)",
        "y ~ self",
        "y ~ np",
        "y ~ lambda: 0",
        "__builtins__ ~ x",
        "y ~ (x | os.environ)",
        "y ~ " + "(" * 5000 + "x" + ")" * 5000,
    ],
)
def test_no_python_gets_in(text):
    with pytest.raises(InputError):
        parse_formula(text, COLUMNS)


def test_names_of_terms_keep_their_brackets():
    tree = parse_formula("y ~ log((x + z) * n)", COLUMNS).tree
    call = tree.right.right  # the scanner puts "1 +" in front
    assert unparse(call) == "log((x + z) * n)"
