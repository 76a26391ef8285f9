"""A user's model as a density: batching, derivatives, and one line for everything that can be wrong with it."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Cauchy, Distribution, Gamma, HalfCauchy, Normal

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets import model as model_module
from hsivi_cli.targets.model import Model, Parameter, density_of

Y = torch.tensor([1.0, 2.0, 3.0, 4.5], dtype=torch.float64)
PARAMETERS = [Parameter("a"), Parameter("b", support="positive")]


def log_prior(p):
    return Normal(0, 1).log_prob(p.a) + Gamma(2.0, 1.0).log_prob(p.b)


def log_likelihood(p):
    return Normal(p.a, p.b).log_prob(Y)


def make(**changes):
    return Model(**({"parameters": PARAMETERS, "log_prior": log_prior, "log_likelihood": log_likelihood} | changes))


def points(n=6, d=2, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected_log_prob(z):
    b = z[:, 1].exp()
    prior = -0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) + z[:, 1] - b
    misfit = (Y - z[:, :1]) / b[:, None]
    likelihood = (-0.5 * misfit**2 - z[:, 1:] - 0.5 * math.log(2 * math.pi)).sum(1)
    return prior + likelihood + z[:, 1]  # the Jacobian of exp


def branching(p):  # vmap cannot branch on a value
    return log_likelihood(p) if p.a > 0 else log_likelihood(p) * 1.0


def in_place(p):
    mean = torch.zeros(4)
    mean[:] = p.a
    return Normal(mean, p.b).log_prob(Y)


def test_log_density_includes_the_jacobian_and_every_normaliser():
    z = points()
    torch.testing.assert_close(density_of(make()).log_prob(z), expected_log_prob(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("likelihood", [branching, in_place])
def test_what_vmap_cannot_batch_runs_draw_by_draw_and_says_so(likelihood):
    density = density_of(make(log_likelihood=likelihood), "my.py")
    assert any("draw by draw" in fact for fact in density.facts)
    assert not any("draw by draw" in fact for fact in density_of(make()).facts)
    z = points().requires_grad_(True)
    torch.testing.assert_close(density.log_prob(z), expected_log_prob(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(density.gradient(z), density_of(make()).gradient(z))


def test_gradient_can_be_differentiated():
    z = points(3).requires_grad_(True)
    for likelihood in (log_likelihood, branching):
        density = density_of(make(log_likelihood=likelihood))
        assert torch.autograd.gradcheck(density.log_prob, (z,))
        assert torch.autograd.gradgradcheck(density.log_prob, (z,))
        curvature = torch.autograd.grad(density.gradient(z).sum(), z)[0]
        rows = [torch.autograd.functional.hessian(lambda r: expected_log_prob(r[None])[0], row) for row in z.detach()]
        torch.testing.assert_close(curvature, torch.stack(rows).sum(1))


def test_chunks_change_nothing(monkeypatch):
    density = density_of(make(generated=lambda p: {"c": p.a * p.b}))
    z = points(7)
    whole = density.log_prob(z), density.constrain(z)["c"]
    monkeypatch.setattr(model_module, "CHUNK_ENTRIES", 8)
    torch.testing.assert_close((density.log_prob(z), density.constrain(z)["c"]), whole)
    assert density.log_prob(z[:0]).shape == (0,)


def test_user_code_runs_in_float64_and_leaves_torch_as_it_was(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile, once used, leaves it off for good
    seen = []

    def likelihood(p):
        seen.append((torch.zeros(1).dtype, Normal(0, 0.1).scale.dtype))
        return Normal(p.a, 0.1).log_prob(Y)

    density_of(make(log_likelihood=likelihood)).log_prob(points())
    assert set(seen) == {(torch.float64, torch.float64)}
    assert torch.get_default_dtype() == torch.float32
    assert Distribution._validate_args


def predictive_model(**changes):
    return make(
        log_likelihood=lambda p, y: Normal(p.a, p.b).log_prob(y),
        simulate=lambda p, generator: Normal(p.a, p.b).sample((4,)),
        sample_prior=lambda generator: {"a": torch.randn((), generator=generator), "b": Gamma(2.0, 1.0).sample()},
        observed=Y,
        **changes,
    )


def test_predictive_parts():
    predictive = density_of(predictive_model()).predictive
    z = points(5)
    first, second, third = (predictive.simulate(z, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == (5, 4)
    torch.testing.assert_close(first, second)  # .sample() of torch.distributions is seeded too
    assert not torch.allclose(first, third)
    torch.testing.assert_close(predictive.log_likelihood(z).sum(1), (expected_log_prob(z) - expected_prior(z)))
    state = torch.random.get_rng_state()
    drawn = predictive.prior(2000, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(drawn[:, 0].mean(), torch.zeros(()).double(), atol=0.12, rtol=0)
    torch.testing.assert_close(drawn[:, 1].exp().mean(), torch.tensor(2.0).double(), atol=0.16, rtol=0)
    other = predictive.condition(Y + 1)
    torch.testing.assert_close(other.predictive.observed, Y + 1)
    assert (other.log_prob(z) != density_of(predictive_model()).log_prob(z)).all()
    torch.testing.assert_close(predictive.condition(Y).log_prob(z), expected_log_prob(z))


def test_simulated_rows_differ_whether_vmap_draws_them_or_not():
    z = torch.zeros(400, 2, dtype=torch.float64)
    for simulate in (lambda p, g: Normal(p.a, p.b).sample((4,)), lambda p, g: p.a + torch.randn(4, generator=g)):
        draw = density_of(make(observed=Y, simulate=simulate)).predictive.simulate
        response = draw(z, torch.Generator().manual_seed(1))
        assert len(torch.unique(response, dim=0)) == 400
        assert (response.mean(0).abs() < 5 / 20).all()
        assert (response.std(0) - 1).abs().max() < 0.2
    # vmap would give every row the same numbers of numpy
    numbers = np.random.default_rng(0)
    draw = density_of(make(observed=Y, simulate=lambda p, g: p.a + torch.tensor(numbers.normal(size=4)))).predictive
    response = draw.simulate(z[:5], torch.Generator().manual_seed(1))
    assert len(torch.unique(response, dim=0)) == 5


def expected_prior(z):
    return -0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) + 2 * z[:, 1] - z[:, 1].exp()


def test_without_their_functions_the_predictive_parts_are_none():
    assert density_of(make()).predictive is None
    plain = make(observed=Y, simulate=lambda p, generator: Normal(p.a, p.b).sample((4,)))
    predictive = density_of(plain).predictive
    assert predictive.prior is None
    assert predictive.condition is None
    scalar = density_of(dataclasses.replace(plain, log_likelihood=lambda p: log_likelihood(p).sum()))
    assert scalar.predictive.log_likelihood is None


def wide(p):
    return Cauchy(0.0, 9.0).log_prob(p.a)


NAN = float("nan")
BROKEN = {
    "log_prior returned shape (4,): sum it": {"log_prior": lambda p: Normal(p.a, 1).log_prob(Y)},
    "row and a column": {"log_likelihood": lambda p: Normal(p.a, p.b).log_prob(Y[:, None] - Y)},
    "log_likelihood is NaN at a=0, b=1": {"log_likelihood": lambda p: torch.log(-p.b)},
    "is +infinity": {"log_likelihood": lambda p: 1 / (0 * p.b)},
    "-inf at every point tried": {"log_prior": lambda p: p.a * 0 - math.inf},
    "is a return missing?": {"log_likelihood": lambda p: None},
    "returned a list": {"log_likelihood": lambda p: [p.a]},
    "torch.float32": {"log_likelihood": lambda p: log_likelihood(p).float()},
    "not differentiable in 'b': keep": {"log_likelihood": lambda p: Normal(p.a, p.b.item()).log_prob(Y)},
    "log_prior is not differentiable in 'a'": {"log_prior": lambda p: log_prior(p) - p.a.detach() ** 2},
    "numpy": {"log_likelihood": lambda p: -(p.a.numpy() ** 2)},
    "is not differentiable in 'a': keep": {"log_likelihood": lambda p: -0.5 * float(p.a) ** 2 - p.b},
    "gradient of log_likelihood in 'a' is NaN": {"log_likelihood": lambda p: -torch.sqrt((p.a - p.a) ** 2) - p.b},
    "must not draw random numbers": {"log_likelihood": lambda p: log_likelihood(p) + torch.randn(4)},
    "no parameter is called 'c': there are a, b (test_model.py, line": {"log_likelihood": lambda p: p.c},
    "size of tensor a (4) must match": {"log_likelihood": lambda p: log_likelihood(p) + torch.zeros(3)},
    "within the support": {"log_prior": lambda p: Gamma(1.0, 1.0).log_prob(-p.b)},
    "4 values for 3 observed": {"observed": Y[:3]},
    "simulate returned shape (3,)": {"observed": Y, "simulate": lambda p, generator: Y[:3]},
    "simulate raised ZeroDivisionError": {"observed": Y, "simulate": lambda p, generator: 1 / 0},
    "sample_prior returned no 'b'": {"sample_prior": lambda generator: {"a": Y[0]}},
    "outside its support, positive": {"sample_prior": lambda generator: {"a": Y[0], "b": -Y[0]}},
    "sample_prior returned shape (4,) for 'a'": {"sample_prior": lambda generator: {"a": Y, "b": Y[0]}},
    "which is a parameter": {"generated": lambda p: {"a": p.a}},
    "must return a dict": {"generated": lambda p: p.a},
    "as a goes to infinity": {"log_prior": lambda p: -p.b, "log_likelihood": lambda p: 0.0},
    "lower end of its support (positive)": {
        "log_prior": lambda p: Normal(0, 1).log_prob(p.a) - p.b - p.b.log(),
        "log_likelihood": lambda p: Normal(p.a, 1.0).log_prob(Y),
    },
}


@pytest.mark.parametrize("line", BROKEN)
def test_one_line_for_what_is_wrong(line):
    with pytest.raises(InputError) as err:
        density_of(make(**BROKEN[line]), "my.py")
    assert line in str(err.value)
    assert str(err.value).startswith("my.py: ")
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"parameters": []}, "one Parameter"),
        ({"parameters": ["a"]}, "one Parameter"),
        ({"parameters": [Parameter("a"), Parameter("a", (2,))]}, "two parameters are called 'a'"),
        ({"log_prior": 3}, "log_prior must be a function"),
        ({"generated": 3}, "generated must be a function"),
        ({"observed": Y * NAN}, "finite numbers"),
        ({"observed": Y[:, None]}, "(4, 1)"),
        ({"observed": "abc"}, "tensor of numbers"),
        ({"log_likelihood": lambda p, y: y.sum()}, "observed=..."),
    ],
)
def test_what_cannot_be_a_model(changes, line):
    with pytest.raises(InputError) as err:
        make(**changes)
    assert line in str(err.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"log_prior": lambda p: 0.0},  # flat, with a likelihood that bounds both
        {"log_prior": lambda p: wide(p) + HalfCauchy(1.0).log_prob(p.b), "log_likelihood": lambda p: 0.0},
        {"log_prior": lambda p: wide(p) + Gamma(0.01, 0.01).log_prob(p.b), "log_likelihood": lambda p: 0.0},
        {"log_likelihood": lambda p: log_likelihood(p) + (-math.inf if p.b > 1.2 else 0.0)},  # some points impossible
    ],
)
def test_heavy_tails_and_flat_priors_that_are_proper_pass(changes):
    assert torch.isfinite(density_of(make(**changes)).log_prob(torch.zeros(1, 2, dtype=torch.float64))).all()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_missing_second_derivatives_are_told():
    facts = density_of(make(log_likelihood=lambda p: log_likelihood(p) - Square.apply(p.a))).facts
    assert any("second derivatives" in fact for fact in facts)


def fails_far_out(error):
    def likelihood(p):
        if p.a > 5:
            raise error("too far")
        return log_likelihood(p)

    return likelihood


def test_failing_later_names_the_line():
    density = density_of(make(log_likelihood=fails_far_out(LookupError)), "my.py")
    with pytest.raises(RunError, match=r"my.py failed at a draw: LookupError: too far \(test_model.py, line \d+\)"):
        density.log_prob(torch.full((1, 2), 9.0, dtype=torch.float64))


def positive_definite_near_by(p):
    correlation = torch.eye(2) + 0.5 * p.a * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return log_likelihood(p) + torch.linalg.cholesky(correlation).sum()


@pytest.mark.parametrize("likelihood", [fails_far_out(ValueError), positive_definite_near_by], ids=["loop", "vmap"])
def test_where_arithmetic_breaks_down_the_density_is_zero_and_only_there(likelihood):
    density = density_of(make(log_likelihood=likelihood))
    z = torch.zeros(7, 2, dtype=torch.float64)
    z[:, 0] = torch.tensor([0.1, 0.2, 9.0, -0.3, 9.0, 0.0, 0.4])
    z.requires_grad_(True)
    value = density.log_prob(z)
    broken = torch.tensor([False, False, True, False, True, False, False])
    assert torch.equal(value.isfinite(), ~broken)
    assert bool((value[broken] == -math.inf).all())
    alone = torch.cat([density.log_prob(z[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(value, alone)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    near = z[~broken].detach().requires_grad_(True)
    (others,) = torch.autograd.grad(density.log_prob(near).sum(), near)
    torch.testing.assert_close(gradient[~broken], others)
    assert bool((gradient[broken, 0] == 0).all())


def test_the_package_offers_model_without_importing_torch():
    script = "import sys, hsivi_cli; assert 'torch' not in sys.modules; from hsivi_cli import Model; Model"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_likelihood_that_forgets_its_parameters_is_mentioned():
    def posterior(log_likelihood):
        normal = torch.distributions.Normal(0.0, 1.0)
        return density_of(Model([Parameter("mu")], lambda p: normal.log_prob(p["mu"]), log_likelihood))

    assert any("posterior is the prior" in fact for fact in posterior(lambda p: torch.tensor(3.0)).facts)
    assert not any("posterior is the prior" in fact for fact in posterior(lambda p: -((p["mu"] - 1) ** 2)).facts)
