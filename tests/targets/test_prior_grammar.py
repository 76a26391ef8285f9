"""The grammar of --prior: what is read, and where an error points."""

import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.targets.prior_grammar import parse_prior
from hsivi_cli.targets.priors import make_prior


@pytest.mark.parametrize(
    ("text", "target", "group", "prior"),
    [
        ("b=normal(0,10)", "b", None, make_prior("normal", 0.0, 10.0)),
        (" Intercept = flat ", "Intercept", None, make_prior("flat")),
        ("sigma=half_cauchy(2.5)", "sigma", None, make_prior("half_cauchy", 2.5)),
        ("sigma=half_student_t(3, 0, 2)", "sigma", None, make_prior("half_student_t", 3.0, 2.0)),
        ("b[mom_iq]=student_t(3, -1, 1e2)", "mom_iq", "b", make_prior("student_t", 3.0, -1.0, 100.0)),
        ("b[age[2]]=gamma(.5,2.)", "age[2]", "b", make_prior("gamma", 0.5, 2.0)),
        ("I(x == 2)=uniform(-1,1)", "I(x == 2)", None, make_prior("uniform", -1.0, 1.0)),
        ("sd[1|g]=exponential(1)", "1|g", "sd", make_prior("exponential", 1.0)),
    ],
)
def test_statements(text, target, group, prior):
    statement = parse_prior(text)
    assert (statement.target, statement.group, statement.prior) == (target, group, prior)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("normal(0,1)", ">>normal(0,1)<<"),
        ("=normal(0,1)", "write name=distribution"),
        ("b=", "b=>><<"),
        ("b=normal(0,1", ">>normal(0,1<<"),
        ("b=norml(0,1)", ">>norml<<(0,1): unknown"),
        ("b=normal(0,x)", "normal(0, >>x<<): not a number"),
        ("b=normal(0,inf)", ">>inf<<"),
        ("b=normal(0,)", ">><<): not a number"),
        ("b=normal(0)", "takes 2 arguments, normal(location, scale)"),
        ("b=normal(0,0)", "scale must be positive"),
        ("b=flat(1)", "takes no arguments"),
        ("b=uniform(2,1)", "below the upper"),
        ("b=__import__('os')", "unknown"),
    ],
)
def test_errors_point_at_the_spot(text, words):
    with pytest.raises(InputError) as caught:
        parse_prior(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
