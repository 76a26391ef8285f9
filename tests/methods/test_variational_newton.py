"""The Newton fit is exact on Gaussians, solves the optimum's equations elsewhere, and never falls below its start."""

import math

import numpy as np
import pandas as pd
import torch

from hsivi_cli.methods.gaussian_vi import fit_gaussian, gaussian_log_prob, moment_matched_normals
from hsivi_cli.methods.laplace import find_mode, hessian_at
from hsivi_cli.methods.variational_newton import variational_newton
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.regression import regression_density
from hsivi_cli.targets.whiten import Affine


def unit(dim, sd=1.0):
    return Affine(torch.zeros(dim, dtype=torch.float64), sd * torch.ones(dim, dtype=torch.float64))


def elbo(density, fitted, u):
    scale = fitted.scale.diag() if fitted.scale.ndim == 1 else fitted.scale
    z = fitted.forward(u)
    return float((density.log_prob(z) - gaussian_log_prob(z, fitted.location, scale)).mean())


def test_a_gaussian_is_found_exactly():
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(torch.arange(6.0).double(), root @ root.T + torch.eye(6).double())
    density = Density("gaussian", 6, lambda z: law.log_prob(z) + 0.7)
    u = moment_matched_normals(64, 6, 0)
    found = variational_newton(density, [unit(6)], u)
    torch.testing.assert_close(found.location, law.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.scale @ found.scale.T, law.covariance_matrix, rtol=0, atol=1e-8)
    assert abs(elbo(density, found, u) - 0.7) < 1e-8


def test_where_the_mode_misleads_the_optimum_is_found_from_elsewhere():
    """`(1 | g)` in non-centred form: the joint mode has a far too large sd."""
    rng = np.random.default_rng(0)
    g = rng.integers(0, 40, 200)
    y = rng.poisson(np.exp(0.5 + 0.5 * rng.normal(size=40)[g]))
    density = regression_density(pd.DataFrame({"y": y, "g": g.astype(str)}), "y ~ (1 | g)", "poisson")
    mode = find_mode(density)
    fit = fit_gaussian(density, start=mode)
    sds = density.constrain(torch.stack([mode.location, fit.location]))["sd_g[Intercept]"]
    assert float(sds[0]) > 2 * float(sds[1])
    assert 0.3 < float(sds[1]) < 0.8
    assert fit.elbo > mode.log_z + 10  # Laplace's value is nowhere near
    # at the optimum the mean gradient is 0 and the precision minus the mean Hessian, up to what the sample leaves
    z = fit.draw(moment_matched_normals(2000, density.dim, 7))
    slope = density.gradient(z).mean(0) @ fit.scale_tril
    assert float(slope.abs().max()) < 0.15
    hessian = torch.stack([hessian_at(density, point) for point in z[:200]]).mean(0)
    whitened = -fit.scale_tril.T @ hessian @ fit.scale_tril
    assert float((whitened.diagonal() - 1).abs().max()) < 0.3
    crude = -mode.scale_tril.T @ hessian @ mode.scale_tril  # the mode's Gaussian fails the same check
    assert float((crude.diagonal() - 1).abs().max()) > 0.6


def test_the_elbo_never_falls_below_the_better_start():
    def log_prob(z):  # skewed, and finite nowhere right of 30
        return torch.where(z > 30, -torch.inf, 2 * z - z.exp()).sum(1)

    density = Density("skewed", 3, log_prob)
    u = moment_matched_normals(128, 3, 0)
    for starts in ([unit(3)], [unit(3), unit(3, 0.1)], [unit(3, 200.0)]):
        found = variational_newton(density, starts, u)
        assert bool((found.scale.triu(1) == 0).all())
        bounds = [elbo(density, start, u) for start in starts]
        assert elbo(density, found, u) > max(b if math.isfinite(b) else -1e300 for b in bounds)
        if max(bounds) > -100:  # from hopeless starts it may end early, but never worse
            assert abs(elbo(density, found, u)) < 0.3  # log Z = 0
