"""Metrics of latents: oracle floors, exact bounds and gaps in a linear model, cluster scores, collapse."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation import latent_metrics as metrics
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.targets.latent_priors import make_prior


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Linear:
    """`z ~ N(0, I)` in two dimensions, `x | z ~ N(A z, 1/4)` in three, A not orthogonal; q is off by `shift`."""

    shift: float = 0.2
    weighted: bool = True

    @property
    def a(self):
        return torch.tensor([[1.0, 0.5], [0.2, 1.0], [0.7, -0.1]], dtype=torch.float64)

    @property
    def precision(self):
        return torch.eye(2).double() + 4 * self.a.T @ self.a

    def log_p(self, x):
        covariance = self.a @ self.a.T + 0.25 * torch.eye(3).double()
        return torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)

    def log_joint(self, x, z):
        noise = torch.distributions.Normal(0.0, 0.5).log_prob(x - z @ self.a.T).sum(-1)
        return noise + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)

    def moments(self, x):
        mean = torch.linalg.solve(self.precision, 4 * self.a.T @ x.T).T + self.shift
        return mean, self.precision.diagonal().rsqrt().expand_as(mean)

    def elbo(self, x):
        """Of q, in closed form."""
        shift = torch.full((2,), self.shift).double()
        return self.log_p(x) - 0.5 * shift @ self.precision @ shift - self.diagonal_gap()

    def diagonal_gap(self):
        return 0.5 * (self.precision.diagonal().log().sum() - torch.logdet(self.precision))

    def draw(self, x, k, generator):
        mean, sd = self.moments(x)
        noise = torch.randn(k, *mean.shape, generator=generator, dtype=torch.float64)
        z = mean + sd * noise
        log_q = torch.distributions.Normal(mean, sd).log_prob(z).sum(-1)
        return LatentDraws(z, self.log_joint(x, z) - log_q if self.weighted else None, mean, sd)


X = normal(40, 3, seed=7)


def test_bounds_are_the_exact_elbo_and_log_p():
    model = Linear()
    found = metrics.bounds(model, X, 4000, seeded())
    assert isinstance(found, metrics.Bounds)
    assert torch.allclose(found.elbo_rows, model.elbo(X), atol=0.12)
    assert found.elbo == pytest.approx(float(model.elbo(X).mean()), abs=0.01)
    assert found.iwae == pytest.approx(float(model.log_p(X).mean()), abs=0.01)
    assert found.elbo < found.iwae
    assert found.elbo_se == pytest.approx(float(found.elbo_rows.std()) / math.sqrt(40))
    assert "IWAE-4000" in found.says


def test_bounds_do_not_depend_on_the_blocks(monkeypatch):
    """Rows in blocks, and the draws of one row in several passes: the same bound, within its noise."""
    whole = metrics.bounds(Linear(), X, 3000, seeded())
    monkeypatch.setattr(metrics, "DRAWS_AT_ONCE", 700)
    parts = metrics.bounds(Linear(), X, 3000, seeded(1))
    assert parts.elbo == pytest.approx(whole.elbo, abs=0.015)
    assert parts.iwae == pytest.approx(whole.iwae, abs=0.015)


def test_paired_differences_are_exact_where_bounds_are_and_their_error_is_that_of_differences():
    """Two encoders of one model differ by a constant a row, while rows themselves differ by nats."""
    one, other = (metrics.bounds(Linear(shift=shift), X, 4000, seeded()) for shift in (0.2, 0.5))
    found = metrics.paired(one, other)
    exact = Linear(shift=0.2).elbo(X) - Linear(shift=0.5).elbo(X)
    assert abs(found.elbo - float(exact.mean())) < 4 * found.elbo_se
    assert abs(found.iwae) < 4 * found.iwae_se  # of the same p(x)
    assert found.elbo_se < 0.1 * one.elbo_se
    back = metrics.paired(other, one)
    assert (back.elbo, back.iwae_se) == pytest.approx((-found.elbo, found.iwae_se))
    with pytest.raises(InputError, match="same rows"):
        metrics.paired(one, metrics.bounds(Linear(), X[:30], 4000, seeded()))
    with pytest.raises(InputError, match="as many draws"):
        metrics.paired(one, metrics.bounds(Linear(), X, 10, seeded()))


def test_one_draw_gives_the_same_elbo_and_iwae_and_no_density_gives_none():
    one = metrics.bounds(Linear(), X, 1, seeded())
    assert torch.allclose(one.elbo_rows, one.iwae_rows, atol=1e-12)
    assert metrics.bounds(Linear(weighted=False), X, 2, seeded()) is None
    with pytest.raises(InputError, match="one or more"):
        metrics.bounds(Linear(), X, 0, seeded())


def test_the_density_of_latents_is_that_of_the_mixture_of_kernel_estimates():
    latents, points, widths = normal(30, 2), normal(11, 2, seed=1), (0.3, 0.9)
    densities = []
    for width in widths:
        estimate = gaussian_kde(latents.T.numpy(), bw_method=1.0)
        estimate.covariance = width**2 * np.eye(2)
        kernel = ((points[:, None] - latents).square().sum(-1) * (-0.5 / width**2)).exp().mean(1)
        densities.append(kernel / (2 * math.pi * width**2))
    expected = -float(torch.stack(densities).mean(0).log().mean())
    assert metrics.latent_nll(latents, points, widths) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("prior", "floor", "plain"), [("pinwheel", 0.914, 2.43), ("square", 1.386, 2.58)], ids=["pinwheel", "square"]
)
def test_oracle_floors_of_the_note(prior, floor, plain):
    """Perfect latents and latents of N(0, I), 10,000 of each, under the bandwidths of run.py."""
    exact = make_prior(prior, 2)
    points = exact.sample(10_000, seeded(1)).double()
    points = points[:4000]
    latents = exact.sample(10_000, seeded(2)).double()
    assert metrics.latent_nll(latents, points) == pytest.approx(floor, abs=0.02)
    assert metrics.latent_nll(normal(10_000, 2), points) == pytest.approx(plain, abs=0.04)


def test_the_bandwidth_set_decides_the_figure():
    exact = make_prior("pinwheel", 2)
    points, latents = exact.sample(2000, seeded(1)), exact.sample(10_000, seeded(2))
    narrow = metrics.latent_nll(latents, points, metrics.RESULT_BANDWIDTHS)
    assert narrow == pytest.approx(-1.314, abs=0.06)
    with pytest.raises(InputError, match="not finite"):
        metrics.latent_nll(torch.full((3, 2), math.nan), points)


def test_nearest_neighbours_vote_and_unknown_labels_are_left_out():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    labels = torch.arange(80) % 2
    train, test = centres[labels] + normal(80, 2), centres[labels] + normal(80, 2, seed=1)
    assert metrics.knn_accuracy(train, labels, test, labels) == 1.0
    assert metrics.knn_accuracy(train, labels, test, 1 - labels) == 0.0
    unknown = torch.where(torch.arange(80) < 40, labels, -1)
    truth = torch.where(torch.arange(80) < 60, labels, -1)
    assert metrics.knn_accuracy(train, unknown, test, truth, neighbours=5) == 1.0
    with pytest.raises(InputError, match="known labels"):
        metrics.knn_accuracy(train, torch.full((80,), -1), test, labels)


def test_cluster_scores():
    truth = torch.tensor([0, 0, 1, 1, 2, 2, -1])
    perfect = metrics.cluster_scores(truth, torch.tensor([5, 5, 3, 3, 1, 1, 0]))
    assert (perfect.purity, perfect.completeness, perfect.nmi) == (1.0, 1.0, 1.0)
    split = metrics.cluster_scores(truth, torch.arange(7))
    assert split.purity == 1.0
    assert split.completeness < 0.7
    one = metrics.cluster_scores(truth, torch.zeros(7).long())
    assert one.purity == pytest.approx(1 / 3)
    assert one.nmi == 0.0


def test_mixture_means_and_heads_find_clusters():
    centres = 6 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    truth = torch.arange(90) % 3
    z = centres[truth] + 0.5 * normal(90, 2)
    for found in (metrics.mixture_clusters(z, 3), metrics.kmeans_clusters(z, 3, starts=3)):
        assert metrics.cluster_scores(truth, found).nmi == 1.0
    with pytest.raises(InputError, match="clusters of 90 rows"):
        metrics.mixture_clusters(z, 91)


def test_gaps_are_those_of_the_linear_model():
    """The approximation gap of a diagonal Gaussian, and the shift's, both known in closed form."""
    model = Linear(shift=0.3)
    mean, sd = model.moments(X)
    gaps = metrics.inference_gaps(model.log_joint, X, mean, sd, seeded(), log_p=model.log_p(X))
    shift = torch.full((2,), 0.3).double()
    expected = float(0.5 * shift @ model.precision @ shift)
    assert float(gaps.amortisation.mean()) == pytest.approx(expected, abs=0.03)
    assert float(gaps.approximation.mean()) == pytest.approx(float(model.diagonal_gap()), abs=0.03)
    assert bool((gaps.amortisation >= 0).all())
    assert torch.allclose(gaps.best_mean, mean - 0.3, atol=0.12)
    assert torch.allclose(gaps.approximation + gaps.amortisation, model.log_p(X) - (gaps.best_elbo - gaps.amortisation))
    again = metrics.inference_gaps(
        model.log_joint, X[:4], mean[:4], sd[:4], seeded(), elbo=model.elbo(X[:4]) - 1, steps=300
    )
    assert again.approximation is None
    assert float(again.amortisation.mean()) == pytest.approx(expected + 1, abs=0.1)


def test_a_start_at_the_optimum_has_no_gap():
    model = Linear(shift=0.0)
    gaps = metrics.inference_gaps(model.log_joint, X, *model.moments(X), seeded(), steps=100)
    assert 0 <= float(gaps.amortisation.mean()) < 0.01


def test_collapse_is_seen_and_said():
    mean = torch.cat([normal(200, 2), 0.01 * normal(200, 1, seed=1)], 1)
    sd = torch.tensor([0.3, 0.5, 1.0]).double().expand(200, 3)
    found = metrics.collapse(mean, sd)
    assert found.active == 2
    assert float(found.kl[2]) < 1e-3 < float(found.kl[0])
    assert found.kl[0] == pytest.approx(float(0.5 * ((mean[:, 0] ** 2).mean() + 0.09 - 1 - 2 * math.log(0.3))))
    assert "1 of 3" in found.warning
    assert "(3)" in found.warning
    assert metrics.collapse(mean[:, :2], sd[:, :2]).warning is None
    assert "has collapsed" in metrics.collapse(0 * mean, sd).warning
    assert isinstance(found.spread, Tensor)
