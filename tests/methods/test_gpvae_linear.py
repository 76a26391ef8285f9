"""GPVAE in a linear-Gaussian model, where evidence, optimum and leverage are known: no draw in sight."""

import math

import pytest
import torch
from linear_latent import certain, make_linear, maximise, noise, set_q, surrogate
from torch import nn

from hsivi_cli.methods.semi_amortised import SviConfig, refine
from hsivi_cli.networks.random_function import FunctionPrior, RandomEncoder, RandomHead
from hsivi_cli.objectives.gpvae_bound import Moments


def features(x, width, seed=5, kind=torch.tanh):
    return kind(x @ noise(x.shape[1], width, seed=seed) + noise(width, seed=seed + 1))


def random_head(width, latent, covariance, mean_function=False, tau=1.0):
    prior = FunctionPrior(covariance, tau, mean_function)
    return RandomHead(width, latent, prior, torch.Generator().manual_seed(0)).double()


def bound_of(problem, head, psi, log_sd, prior_mean=0.0, kappa=1.0):
    mean, v = head(psi)
    return problem.elbo(Moments(mean + prior_mean, log_sd, v, torch.zeros_like(v))).sum() - kappa * head.kl()


@pytest.fixture(scope="module")
def aligned():
    """Orthogonal columns: the exact q(W) is independent over the rows of W. With b, psi, g and the evidence."""
    problem = make_linear(orthogonal=True)
    psi, b = features(problem.x, 5), 0.3 * features(problem.x, 2, seed=8)
    log_sd = problem.best_log_sd() + 0.1
    return problem, psi, b, log_sd, surrogate(problem, psi, b, log_sd)


def blocks(exact, latent, width):
    return exact.mean.reshape(latent, width), exact.precision.reshape(latent, width, latent, width)


def test_the_best_full_q_attains_the_surrogate_evidence_and_the_best_diagonal_one_does_not(aligned):
    problem, psi, b, log_sd, exact = aligned
    mean, precision = blocks(exact, 2, 5)
    own = torch.stack([precision[j, :, j] for j in range(2)])
    full, diagonal = random_head(5, 2, "full"), random_head(5, 2, "diagonal")
    set_q(full, mean, torch.linalg.inv(own))
    set_q(diagonal, mean, torch.diag_embed(1 / own.diagonal(dim1=1, dim2=2)))
    best = float(bound_of(problem, full, psi, log_sd, b).detach())
    assert best == pytest.approx(exact.log_z, abs=1e-9)
    lower = float(bound_of(problem, diagonal, psi, log_sd, b).detach())
    assert lower < exact.log_z - 0.5
    assert exact.log_z < float(problem.log_p().sum())
    # any other q is lower, and gradients find this one
    wrong = random_head(5, 2, "full")
    assert float(bound_of(problem, wrong, psi, log_sd, b).detach()) < best
    found = maximise(lambda: bound_of(problem, wrong, psi, log_sd, b), wrong.parameters())
    assert exact.log_z - 1e-3 < found < exact.log_z + 1e-9
    found = maximise(lambda: bound_of(problem, diagonal, psi, log_sd, b), diagonal.parameters())
    assert found == pytest.approx(lower, abs=1e-6)
    shared = random_head(5, 2, "shared")
    found = maximise(lambda: bound_of(problem, shared, psi, log_sd, b), shared.parameters())
    assert found < exact.log_z


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_what_the_bound_lacks_is_the_kl_to_the_exact_posterior_of_the_weights(covariance):
    """Columns that are not orthogonal: the exact posterior couples the rows of W, which no q here does."""
    problem = make_linear(seed=20)
    psi, log_sd = features(problem.x, 5), make_linear(seed=20).best_log_sd()
    exact = surrogate(problem, psi, torch.zeros(60, 2).double(), log_sd)
    head = random_head(5, 2, covariance)
    mean, scales = 0.1 * noise(2, 5, seed=30), noise(2, 5, 5, seed=31)
    scales = 0.02 * (scales @ scales.mT + torch.eye(5))
    scales = scales if covariance == "full" else torch.diag_embed(scales.diagonal(dim1=1, dim2=2))
    set_q(head, mean, scales)
    normal = torch.distributions.MultivariateNormal
    q = normal(mean.reshape(-1), torch.block_diag(*scales))
    lack = torch.distributions.kl_divergence(q, normal(exact.mean, precision_matrix=exact.precision))
    assert exact.log_z - float(bound_of(problem, head, psi, log_sd).detach()) == pytest.approx(float(lack), abs=1e-7)
    assert exact.log_z < float(problem.log_p().sum())


@pytest.mark.parametrize("rows", [50, 500, 5000])
def test_v_is_the_leverage_of_the_features(rows):
    problem = make_linear(rows=rows, orthogonal=True, seed=40)
    psi = features(problem.x, 20, kind=torch.relu)
    lam = problem.precision.diagonal()
    gram = psi.T @ psi
    head = random_head(20, 2, "full")
    set_q(head, torch.zeros(2, 20), torch.stack([torch.linalg.inv(torch.eye(20) + one * gram) for one in lam]))
    # it is where the bound is highest in the covariance, and so what training goes to
    at_top = gradient_size(problem, head, psi)
    with torch.no_grad():
        share = head(psi)[1] * lam  # v / h^2
        head.log_sd += 0.05
    assert at_top < 1e-6 * gradient_size(problem, head, psi)
    effective = torch.stack([torch.trace(torch.linalg.solve(gram + torch.eye(20) / one, gram)) for one in lam])
    assert torch.allclose(share.mean(0), effective / rows, rtol=1e-6)
    assert float(share.mean()) * rows == pytest.approx(20, rel=0.15)  # falls like 1/N
    with torch.no_grad():
        far = head(features(4 * problem.x, 20, kind=torch.relu))[1] * lam
    assert float(far.mean()) > 10 * float(share.mean())


def gradient_size(problem, head, psi):
    bound = bound_of(problem, head, psi, problem.best_log_sd())
    by_sd, by_below = torch.autograd.grad(bound, (head.log_sd, head.below))
    return float(by_sd.norm() + by_below.tril(-1).norm())


def make_encoder(width, covariance, trunk, latent=2, tau=1.0, mean_function=True):
    mean = FunctionPrior(covariance, tau, mean_function)
    generator = torch.Generator().manual_seed(1)
    return RandomEncoder(trunk, width, latent, mean, FunctionPrior("none"), generator, "none").double()


def train(problem, encoder, kappa=1.0, steps=150):
    rows = len(problem.x)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    return maximise(
        lambda: problem.elbo(encoder(problem.x)).mean() - kappa * encoder.weight_kl() / rows, parameters, steps
    )


def test_the_amortisation_gap_is_zero_where_the_features_hold_x_and_refinement_closes_it_where_not():
    problem = make_linear(rows=100, seed=50)
    best = problem.best_diagonal_elbo()
    linear = make_encoder(6, "none", nn.Identity())
    assert train(problem, linear) == pytest.approx(float(best.mean()), abs=1e-3)
    narrow = make_encoder(3, "none", lambda x: features(x, 3))
    reached = train(problem, narrow)
    assert reached < float(best.mean()) - 0.05
    at = narrow(problem.x)
    for rule in (SviConfig(steps=500, lr=1.0), SviConfig(steps=500, lr=0.02, rule="sgd")):
        refined = refine(lambda mean, log_sd: problem.elbo(certain(mean, log_sd)), at.mean, at.log_sd, rule)
        assert torch.allclose(problem.elbo(certain(*refined)), best, atol=1e-6)
    few = refine(lambda m, s: problem.elbo(certain(m, s)), at.mean, at.log_sd, SviConfig(steps=8))
    assert reached < float(problem.elbo(certain(*few)).mean()) <= float(best.mean()) + 1e-9
    # rows do not meet: one alone gets the same answer
    alone = refine(
        lambda m, s: problem.elbo(certain(m, s), problem.x[3:4]), at.mean[3:4], at.log_sd[3:4], SviConfig(steps=8)
    )
    assert torch.allclose(alone[0], few[0][3:4], atol=1e-12)


def test_without_the_weights_kl_and_with_a_vanishing_tau_it_is_the_vae():
    problem = make_linear(rows=100, seed=50)

    def made(covariance, tau=1.0):
        return make_encoder(3, covariance, lambda x: features(x, 3), tau=tau)

    vae = train(problem, made("none"))
    free, bound, vanishing = made("diagonal"), made("diagonal"), made("diagonal", tau=1e-4)
    assert train(problem, free, kappa=0.0) == pytest.approx(vae, abs=1e-5)
    assert float(free(problem.x).v.detach().max()) < 1e-5
    assert train(problem, vanishing) == pytest.approx(vae, abs=1e-5)
    # with both it is another: v stays, and the ELBO of the functions is below the VAE's
    assert train(problem, bound) < vae - 1e-2
    assert float(bound(problem.x).v.detach().mean()) > 3e-4


def test_a_learnt_tau_goes_to_zero_under_a_mean_function_and_stays_without():
    problem = make_linear(rows=100, seed=50)
    prior = FunctionPrior("diagonal", 1.0, True, True)
    generator = torch.Generator().manual_seed(1)
    none = FunctionPrior("none")
    under = RandomEncoder(lambda x: features(x, 3), 3, 2, prior, none, generator, "none").double()
    prior = FunctionPrior("diagonal", 1.0, False, True)
    without = RandomEncoder(lambda x: features(x, 3), 3, 2, prior, none, generator, "none").double()
    train(problem, under)
    train(problem, without)
    assert float(under.mean_head.tau.detach()) < 0.05
    assert 0.2 < float(without.mean_head.tau.detach()) < 5.0


def test_uncertainty_costs_and_a_looser_prior_costs_more():
    problem = make_linear(rows=60, seed=60)
    mean, log_sd = problem.posterior_mean(), problem.best_log_sd()
    zero, some = torch.zeros_like(mean), torch.full_like(mean, 0.05)
    alone = problem.elbo(Moments(mean, log_sd, zero, zero))
    assert bool((problem.elbo(Moments(mean, log_sd, some, zero)) < alone).all())
    assert bool((problem.elbo(Moments(mean, log_sd, zero, some)) < alone).all())
    seen = []
    for tau in (0.1, 0.3, 1.0):
        encoder = make_encoder(6, "diagonal", nn.Identity(), tau=tau)
        train(problem, encoder)
        at = encoder(problem.x)
        seen.append((float(at.v.mean()), float(problem.elbo(at).mean())))
    assert seen[0][0] < seen[1][0] < seen[2][0]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert all(math.isfinite(value) for pair in seen for value in pair)
