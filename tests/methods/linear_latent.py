"""`z ~ N(0, I)`, `x | z ~ N(A z + a, sd^2)` with features of any kind: everything about GPVAE's bound is known here."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hsivi_cli.networks.decoders import MlpDecoder
from hsivi_cli.objectives.gpvae_bound import Moments, expected_linear_log_likelihood, expected_prior_kl
from hsivi_cli.targets.latent import LatentModel, LatentTask
from hsivi_cli.targets.latent_priors import make_prior
from hsivi_cli.targets.likelihoods import Likelihood


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Linear:
    """`weight` (D, d), `offset` (D,), `sd`; rows `x` (N, D)."""

    weight: Tensor
    offset: Tensor
    sd: Tensor
    x: Tensor

    @property
    def precision(self) -> Tensor:
        """Of z given x, (d, d): the same for every row."""
        return torch.eye(self.weight.shape[1]).double() + self.weight.T @ self.weight / self.sd**2

    def posterior_mean(self, x=None):
        x = self.x if x is None else x
        return torch.linalg.solve(self.precision, ((x - self.offset) @ self.weight / self.sd**2).T).T

    def log_p(self, x=None):
        """log p(x) of each row."""
        x = self.x if x is None else x
        covariance = self.weight @ self.weight.T + self.sd**2 * torch.eye(len(self.offset)).double()
        return torch.distributions.MultivariateNormal(self.offset, covariance).log_prob(x)

    def best_log_sd(self):
        """Of the best diagonal Gaussian: the precision's diagonal."""
        return (-0.5 * self.precision.diagonal().log()).expand(len(self.x), -1)

    def elbo(self, at, x=None):
        """E over functions of the ELBO, a row, in closed form."""
        x = self.x if x is None else x
        return expected_linear_log_likelihood(x, self.weight, self.offset, self.sd, at) - expected_prior_kl(at)

    def best_diagonal_elbo(self):
        """log p less the gap of a diagonal Gaussian to a full one, `1/2 (sum log Lam_jj - log det Lam)`."""
        precision = self.precision
        return self.log_p() - 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))


def make_linear(rows=60, columns=6, latent=2, sd=0.6, orthogonal=False, seed=0):
    weight = noise(columns, latent, seed=seed)
    if orthogonal:
        weight = torch.linalg.qr(weight)[0] * torch.linspace(0.8, 1.6, latent).double()
    offset, sd = noise(columns, seed=seed + 1), torch.tensor(sd).double()
    z, e = noise(rows, latent, seed=seed + 2), noise(rows, columns, seed=seed + 3)
    return Linear(weight, offset, sd, z @ weight.T + offset + sd * e)


def certain(mean, log_sd):
    zero = torch.zeros_like(mean)
    return Moments(mean, log_sd, zero, zero)


@dataclass(frozen=True)
class Surrogate:
    """The Gaussian posterior over W (tau = 1, rows of W end to end) of (5) for a fixed h, and its evidence log Z."""

    mean: Tensor
    precision: Tensor
    log_z: float


def surrogate(problem, psi, prior_mean, log_sd):
    """`psi` (N, p), `prior_mean` (N, d) is b(x), `log_sd` (N, d) is g(x)."""
    lam, residual = problem.precision, problem.x - problem.offset
    linear = residual @ problem.weight / problem.sd**2 - prior_mean @ lam
    w0 = (linear.T @ psi).reshape(-1)
    precision = torch.eye(len(w0)).double() + torch.kron(lam, psi.T @ psi)
    mean = torch.linalg.solve(precision, w0)
    base = problem.elbo(certain(prior_mean, log_sd)).sum()
    log_z = base + 0.5 * w0 @ mean - 0.5 * torch.logdet(precision)
    return Surrogate(mean, precision, float(log_z))


def set_q(head, mean, scales):
    """Put `N(mean_j, scales_j)` into a head: (d, p) and (d, p, p)."""
    factor = torch.linalg.cholesky(scales)
    deviation = factor.diagonal(dim1=-2, dim2=-1)
    with torch.no_grad():
        head.mean.copy_(mean)
        head.log_sd.copy_(deviation.log())
        if head.prior.covariance == "full":
            head.below.copy_(factor / deviation[..., None] - torch.eye(factor.shape[-1]))


def maximise(bound, parameters, steps=200):
    """The bound after L-BFGS, with its gradient in double."""
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
    )

    def closure():
        optimiser.zero_grad()
        loss = -bound()
        loss.backward()
        return loss

    optimiser.step(closure)
    value = float(bound().detach())
    assert math.isfinite(value)
    return value


def as_task(problem, learn=True):
    """The same as rows and a model in float64, as the methods take them."""
    columns, latent = problem.weight.shape
    decoder = MlpDecoder(latent, (), columns).double()
    last = decoder.net[0]
    with torch.no_grad():
        last.weight.copy_(problem.weight)
        last.bias.copy_(problem.offset)
    model = LatentModel(make_prior("normal", latent), decoder, Likelihood("gaussian"), log_sd=problem.sd.log()[None])
    return LatentTask(problem.x, model.requires_grad_(learn))
