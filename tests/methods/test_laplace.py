"""Laplace is exact on quadratics, units do not matter, and a posterior that is no posterior is told as such."""

import math

import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.methods.laplace import find_mode, gaussian_at, hessian_at, require_proper
from hsivi_cli.targets.density import Density

X = torch.stack([torch.ones(20, dtype=torch.float64), torch.linspace(-2, 2, 20, dtype=torch.float64)], 1)


def gaussian(dim, seed=0, units=1.0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-units, units, dim, dtype=torch.float64)
    covariance = (root @ root.T + torch.eye(dim, dtype=torch.float64)) * scales[:, None] * scales
    location = 3 * scales * torch.randn(dim, generator=generator, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(location, covariance)
    return Density("gaussian", dim, lambda z: law.log_prob(z) + 1.7), location, covariance


def logistic(design, response, prior_sd=None):
    def log_prob(z):
        linear = z @ design.T
        prior = 0.0 if prior_sd is None else -0.5 * (z**2).sum(1) / prior_sd**2
        return (response * linear - torch.nn.functional.softplus(linear)).sum(1) + prior

    return Density("logistic", design.shape[1], log_prob)


def linear_regression(design, response, prior_sd=None):
    width = design.shape[1]

    def log_prob(z):
        residual, log_sigma = response - z[:, :width] @ design.T, z[:, width]
        prior = 0.0 if prior_sd is None else -0.5 * (z[:, :width] ** 2).sum(1) / prior_sd**2
        return -0.5 * (residual**2).sum(1) * torch.exp(-2 * log_sigma) - (len(response) - 1) * log_sigma + prior

    return Density("linear", width + 1, log_prob)


@pytest.mark.parametrize("units", [0.0, 4.0])
def test_exact_on_a_gaussian_whatever_its_units(units):
    density, location, covariance = gaussian(6, units=units)
    mode = find_mode(density)
    sd = covariance.diagonal().sqrt()
    assert mode.kind == "mode"
    assert mode.converged
    torch.testing.assert_close(mode.location / sd, location / sd, rtol=0, atol=1e-6)
    found = mode.scale_tril @ mode.scale_tril.T
    torch.testing.assert_close(found / sd / sd[:, None], covariance / sd / sd[:, None], rtol=0, atol=1e-8)
    torch.testing.assert_close(mode.precision @ covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    assert bool((mode.scale_tril.triu(1) == 0).all())
    assert bool((mode.scale_tril.diagonal() > 0).all())
    assert abs(mode.log_z - 1.7) < 1e-9
    require_proper(mode, density)


def test_hessian_is_the_second_derivative_with_and_without_autograd():
    response = (X[:, 1] > 0.3).double()
    density = logistic(X, response, 1.0)
    z = torch.tensor([0.3, -0.7], dtype=torch.float64)
    exact = torch.autograd.functional.hessian(lambda z: density.log_prob(z[None])[0], z)
    torch.testing.assert_close(hessian_at(density, z), exact, rtol=1e-12, atol=1e-12)

    def opaque(z):
        return (response - torch.sigmoid(z.detach() @ X.T)) @ X - z.detach()

    blind = Density("blind", 2, density.log_prob, analytic_gradient=opaque)
    torch.testing.assert_close(hessian_at(blind, z), exact, rtol=1e-7, atol=1e-7)


def test_an_indefinite_hessian_still_gives_a_gaussian():
    hessian = torch.tensor([[-4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    precision, scale_tril = gaussian_at(hessian)
    torch.testing.assert_close(precision, torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(scale_tril @ scale_tril.T, precision.inverse())


def test_several_modes_are_found_and_the_highest_is_first():
    def log_prob(z):
        far = -0.5 * ((z - 4) ** 2).sum(1)
        near = -0.5 * ((z + 1) ** 2).sum(1)
        return torch.logaddexp(far + math.log(0.8), near + math.log(0.2))

    start = torch.full((2,), 3.0, dtype=torch.float64)
    mode = find_mode(Density("two", 2, log_prob), start)
    torch.testing.assert_close(mode.location, torch.full((2,), 4.0, dtype=torch.float64), rtol=0, atol=1e-3)
    assert mode.others.shape == (1, 2)
    torch.testing.assert_close(mode.others[0], torch.full((2,), -1.0, dtype=torch.float64), rtol=0, atol=1e-3)
    assert float(mode.others_log_prob[0]) < mode.log_prob


IMPROPER = {
    "separation": logistic(X, (X[:, 1] > 0.1).double()),
    "a level that always succeeds": logistic((X > 0).double(), ((X[:, 1] > 0) | (X[:, 1] < -1)).double()),
    "collinear columns": linear_regression(torch.cat([X, 2 * X[:, 1:] - 1], 1), X[:, 1].sin()),
    "a flat coordinate": Density("flat", 3, lambda z: -0.5 * (z[:, :2] ** 2).sum(1)),
    "a rising line": Density("line", 2, lambda z: z[:, 0] - 0.5 * z[:, 1] ** 2),
}


@pytest.mark.parametrize("name", IMPROPER)
def test_improper_posteriors_are_told(name):
    density = IMPROPER[name]
    mode = find_mode(density)
    assert mode.kind == "improper", mode
    assert not mode.converged
    with pytest.raises(InputError, match=r"improper.*z\[\d"):
        require_proper(mode, density)


PROPER = {
    "separation with a vague prior": logistic(X, (X[:, 1] > 0.1).double(), 100.0),
    "collinear with a vague prior": linear_regression(torch.cat([X, 2 * X[:, 1:] - 1], 1), X[:, 1].sin(), 1e4),
    "Cauchy": Density("cauchy", 1, lambda z: -torch.log1p(z[:, 0] ** 2)),
    "Cauchy in five dimensions": Density("cauchy", 5, lambda z: -3 * torch.log1p((z**2).sum(1))),
    "units of a million": linear_regression(X * torch.tensor([1.0, 1e6]), 1e5 * X[:, 1].sin(), None),
}


@pytest.mark.parametrize("name", PROPER)
def test_vague_heavy_tailed_and_badly_scaled_posteriors_are_not(name):
    mode = find_mode(PROPER[name])
    assert mode.kind == "mode", mode
    assert mode.converged


def test_a_proper_funnel_without_a_mode_is_not_called_improper():
    # theta_j ~ N(mu, tau): the density grows without bound as tau -> 0, and is integrable all the same
    response = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.float64)

    def log_prob(z):
        theta, mu, log_tau = z[:, :4], z[:, 4], z[:, 5]
        within = -0.5 * (((theta - mu[:, None]) / log_tau.exp()[:, None]) ** 2).sum(1) - 4 * log_tau
        prior = log_tau - torch.log1p((log_tau.exp() / 5) ** 2) - 0.5 * (mu / 5) ** 2
        return within + prior - 0.5 * (((response - theta) / 10) ** 2).sum(1)

    mode = find_mode(Density("centred", 6, log_prob))
    assert mode.kind == "unbounded"
    require_proper(mode, Density("centred", 6, log_prob))


def test_a_density_that_is_nowhere_finite_is_refused():
    with pytest.raises(InputError, match="finite at none"):
        find_mode(Density("nan", 2, lambda z: z[:, 0] * math.nan))
