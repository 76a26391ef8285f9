"""Supports: Jacobians against autograd, round trips, and priors whose density must still integrate to one."""

import math

import pytest
import torch
from torch.distributions import Beta, Dirichlet, Gamma, HalfCauchy, LKJCholesky, Normal, Uniform, constraints

from hsivi_cli.errors import InputError
from hsivi_cli.targets.model import Model, density_of
from hsivi_cli.targets.supports import CovarianceCholeskyTransform, Parameter, coordinate_names, unconstrain_all

CASES = [
    ("real", (3,), 3),
    ("positive", (3,), 3),
    ("negative", (2,), 2),
    ("unit", (2, 2), 4),
    ("interval(-1, 4)", (3,), 3),
    ("greater_than(2)", (), 1),
    ("less_than(-2)", (), 1),
    ("simplex", (4,), 3),
    ("simplex", (2, 3), 4),
    ("ordered", (4,), 4),
    ("correlation_cholesky", (4, 4), 6),
    ("correlation_cholesky", (2, 3, 3), 6),
    ("covariance_cholesky", (3, 3), 6),
    (constraints.interval(0.0, 2.0), (2,), 2),
]


def free_entries(support, value):
    """As many entries of a value as it has free coordinates: those its density is taken over."""
    if support == "simplex":
        return value[..., :-1].reshape(-1)
    if support in ("correlation_cholesky", "covariance_cholesky"):
        row, column = torch.tril_indices(value.shape[-1], value.shape[-1], -1 if support.startswith("corr") else 0)
        return value[..., row, column].reshape(-1)
    return value.reshape(-1)


@pytest.mark.parametrize(("support", "shape", "size"), CASES, ids=str)
def test_jacobian_dimension_and_round_trip(support, shape, size):
    parameter = Parameter("p", shape, support)
    assert parameter.size == size == len(coordinate_names((parameter,)))
    u = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, log_jacobian = parameter.constrain(u)
    assert value.shape == (5, *shape)
    torch.testing.assert_close(parameter.unconstrain(value), u, rtol=1e-8, atol=1e-8)
    for row, found in zip(u, log_jacobian, strict=True):
        matrix = torch.autograd.functional.jacobian(
            lambda r: free_entries(support, parameter.constrain(r[None])[0][0]), row
        )
        torch.testing.assert_close(found, torch.linalg.slogdet(matrix)[1], rtol=1e-9, atol=1e-9)


def test_values_lie_in_their_support():
    u = 3 * torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    checks = {
        "simplex": lambda y: (y > 0).all() and torch.allclose(y.sum(-1), torch.ones(50).double()),
        "ordered": lambda y: (y.diff(dim=-1) > 0).all(),
        "correlation_cholesky": lambda y: torch.allclose(
            (y @ y.mT).diagonal(dim1=1, dim2=2), torch.ones(50, 4).double()
        ),
        "covariance_cholesky": lambda y: (y.diagonal(dim1=1, dim2=2) > 0).all() and (y.triu(1) == 0).all(),
        "interval(2,3)": lambda y: ((y > 2) & (y < 3)).all(),
        "less_than(-1)": lambda y: (y < -1).all(),
    }
    shapes = {"simplex": (7,), "ordered": (6,), "correlation_cholesky": (4, 4), "covariance_cholesky": (3, 3)}
    for support, check in checks.items():
        assert bool(check(Parameter("p", shapes.get(support, (6,)), support).constrain(u)[0])), support


@pytest.mark.parametrize(
    ("parameter", "log_prior"),
    [
        (Parameter("p", (), "real"), lambda p: Normal(0.3, 1.2).log_prob(p.p)),
        (Parameter("p", (), "positive"), lambda p: Gamma(2.0, 1.5).log_prob(p.p)),
        (Parameter("p", (), "positive"), lambda p: HalfCauchy(1.0).log_prob(p.p)),
        (Parameter("p", (), "negative"), lambda p: Gamma(2.0, 1.5).log_prob(-p.p)),
        (Parameter("p", (), "unit"), lambda p: Beta(2.0, 1.5).log_prob(p.p)),
        (Parameter("p", (), "interval(1,3)"), lambda p: Uniform(1.0, 3.0).log_prob(p.p)),
        (Parameter("p", (), "greater_than(2)"), lambda p: Gamma(2.0, 1.5).log_prob(p.p - 2)),
        (Parameter("p", (2, 2), "correlation_cholesky"), lambda p: LKJCholesky(2, 1.5).log_prob(p.p)),
        (Parameter("p", (2,), "simplex"), lambda p: Dirichlet(torch.tensor([2.0, 3.0])).log_prob(p.p)),
        (Parameter("p", (3,), "simplex"), lambda p: Dirichlet(torch.tensor([2.0, 3.0, 1.5])).log_prob(p.p)),
        # two ordered standard normals: twice their joint density
        (Parameter("p", (2,), "ordered"), lambda p: math.log(2) + Normal(0.0, 1.0).log_prob(p.p).sum()),
    ],
    ids=lambda case: str(case.support) + str(case.shape) if isinstance(case, Parameter) else "",
)
def test_a_prior_still_integrates_to_one(parameter, log_prior):
    density = density_of(Model([parameter], log_prior, lambda p: 0.0))
    if density.dim == 1:
        grid = torch.linspace(-40, 40, 8001, dtype=torch.float64)
        cell, points = float(grid[1] - grid[0]), grid[:, None]
    else:
        grid = torch.linspace(-14, 14, 281, dtype=torch.float64)
        cell, points = float(grid[1] - grid[0]) ** 2, torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        assert abs(float(torch.exp(density.log_prob(points)).sum()) * cell - 1) < 1e-5


def test_unconstrain_all_undoes_the_order_of_the_parameters():
    parameters = (Parameter("a", (3,), "simplex"), Parameter("b"), Parameter("c", 2, "positive"))
    density = density_of(Model(list(parameters), lambda p: Normal(0, 1).log_prob(p.b) - p.c.sum(), lambda p: 0.0))
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(unconstrain_all(parameters, density.constrain(z)), z)
    assert coordinate_names(parameters) == ["a[1]", "a[2]", "b", "c[1]", "c[2]"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a b",), "use letters"),
        (("a", (0,)), "positive whole numbers"),
        (("a", (2.5,)), "positive whole numbers"),
        (("a", (), "pos"), "is not known: use real, positive"),
        (("a", (), "interval(3,1)"), "finite edges"),
        (("a", (), "interval(0,inf)"), "finite edges"),
        (("a", (), "simplex"), "last dimension"),
        (("a", (1,), "simplex"), "nothing free"),
        (("a", (2, 3), "correlation_cholesky"), "equal"),
        (("a", (), 3), "is not known"),
    ],
)
def test_what_cannot_be_a_parameter(arguments, line):
    with pytest.raises(InputError) as err:
        Parameter(*arguments)
    assert line in str(err.value)
    assert "\n" not in str(err.value)


def test_covariance_factor_is_filled_row_by_row():
    x = torch.tensor([0.0, 2.0, 0.0, 4.0, 5.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([[1, 0, 0], [2, 1, 0], [4, 5, 1]], dtype=torch.float64)
    torch.testing.assert_close(CovarianceCholeskyTransform()(x), expected)
