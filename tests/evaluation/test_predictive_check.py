import math

import pytest
import torch

from hsivi_cli.errors import RunError
from hsivi_cli.evaluation import predictive_check
from hsivi_cli.evaluation.predictive_check import check_predictive, leave_one_out


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(z, g):
    """Mean z[0], sd exp(z[1]), 200 observations."""
    return z[:, :1] + z[:, 1:].exp() * torch.randn(len(z), 200, generator=g, dtype=torch.float64)


def draws_near(mean, log_sd, n=1000):
    g = generator(7)
    return torch.tensor([mean, log_sd]) + torch.randn(n, 2, generator=g, dtype=torch.float64) * 0.05


OBSERVED = torch.randn(200, generator=generator(3), dtype=torch.float64)


def by_name(check):
    return {statistic.name: statistic for statistic in check.statistics}


def test_the_right_model_shows_nothing():
    check = check_predictive(draws_near(0.0, 0.0), OBSERVED, normal, generator())
    assert set(by_name(check)) == {"mean", "sd", "min", "max"}
    assert check.extremes == ()
    assert check.replications == 1000
    assert check.non_finite == 0
    assert by_name(check)["mean"].observed == pytest.approx(float(OBSERVED.mean()))
    assert by_name(check)["sd"].mean == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("mean", "log_sd", "names"), [(0.5, 0.0, {"mean"}), (0.0, 0.7, {"sd", "min", "max"}), (0.0, -0.7, {"sd"})]
)
def test_a_wrong_fit_shows_where(mean, log_sd, names):
    check = check_predictive(draws_near(mean, log_sd), OBSERVED, normal, generator())
    assert names <= {statistic.name for statistic in check.extremes}
    if log_sd == 0.7:
        assert by_name(check)["sd"].p == 1  # replicated beyond observed
    if log_sd == -0.7:
        assert by_name(check)["sd"].p == 0


def test_p_values_of_the_true_model_are_uniform_or_milder():
    p = []
    for seed in range(200):
        observed = torch.randn(200, generator=generator(seed), dtype=torch.float64)
        truth = torch.zeros(200, 2, dtype=torch.float64)
        p.append([s.p for s in check_predictive(truth, observed, normal, generator(seed + 1)).statistics])
    p = torch.tensor(p)
    assert float((p.mean(0) - 0.5).abs().max()) < 4.5 * math.sqrt(1 / 12 / 200)
    assert float((p.var(0) - 1 / 12).abs().max()) < 0.025


def test_counts_have_their_zeros_checked():
    def poisson(z, g):
        return torch.poisson(z.exp().expand(-1, 300), generator=g)

    observed = torch.poisson(torch.full((300,), 2.0, dtype=torch.float64), generator=generator())
    rate = torch.full((500, 1), math.log(2.0), dtype=torch.float64)
    assert check_predictive(rate, observed, poisson, generator(1)).extremes == ()
    observed[:100] = 0
    found = by_name(check_predictive(rate + math.log(observed.mean() / 2), observed, poisson, generator(1)))
    assert found["zeros"].p < 0.005
    assert found["zeros"].observed == pytest.approx(float((observed == 0).double().mean()))
    assert not found["mean"].extreme
    scores = (100 + 15 * OBSERVED).round()  # whole numbers, but the model's are not
    check = check_predictive(draws_near(0.0, 0.0), scores, lambda z, g: 100 + 15 * normal(z, g), generator())
    assert "zeros" not in by_name(check)


def test_few_replications_raise_no_false_alarm_but_see_what_is_far_off():
    alarms = 0
    for seed in range(150):
        observed = torch.randn(200, generator=generator(seed), dtype=torch.float64)
        truth = torch.zeros(20, 2, dtype=torch.float64)
        alarms += len(check_predictive(truth, observed, normal, generator(seed + 1)).extremes)
    assert alarms <= 2  # without caution one in 21 of 600 on either side
    assert "mean" in {
        s.name for s in check_predictive(draws_near(1.0, 0.0, 20), OBSERVED, normal, generator()).extremes
    }


def test_statistics_without_spread_are_no_sign_of_anything():
    def coin(z, g):
        return torch.bernoulli(torch.full((len(z), 200), 0.5), generator=g)

    observed = coin(torch.zeros(1, 1), generator(5))[0]
    check = check_predictive(torch.zeros(300, 1), observed, coin, generator())
    assert "zeros" not in by_name(check)
    assert by_name(check)["min"].p == by_name(check)["max"].p == 0.5
    assert check.extremes == ()


def test_blocks_and_limits_change_memory_not_results(monkeypatch):
    plain = check_predictive(draws_near(0.0, 0.0), OBSERVED, lambda z, g: z[:, :1] + OBSERVED, generator(), limit=100)
    monkeypatch.setattr(predictive_check, "CELLS", 1000)
    sizes = []

    def simulate(z, g):
        sizes.append(len(z))
        return z[:, :1] + OBSERVED

    blocks = check_predictive(draws_near(0.0, 0.0), OBSERVED, simulate, generator(), limit=100)
    assert blocks.statistics == plain.statistics
    torch.testing.assert_close(blocks.high, plain.high)
    assert sizes == [5] * 20


def test_infinite_responses_are_counted():
    def overflow(z, g):
        y = normal(z, g)
        y[::4] = math.inf
        return y

    check = check_predictive(draws_near(0.0, 0.0, 400), OBSERVED, overflow, generator())
    assert (check.replications, check.non_finite) == (300, 100)
    with pytest.raises(RunError, match="no response"):
        check_predictive(draws_near(0.0, 0.0, 4), OBSERVED, lambda z, g: normal(z, g) / 0, generator())


@pytest.mark.parametrize("observed", [OBSERVED, OBSERVED.round(), (5 * OBSERVED).exp().floor(), torch.ones(3)])
def test_histograms_hold_everything(observed):
    check = check_predictive(
        torch.zeros(50, 1, dtype=torch.float64), observed, lambda z, g: observed + torch.zeros(len(z), 1), generator()
    )
    assert float(check.observed.sum()) == pytest.approx(1)
    torch.testing.assert_close(check.low, check.observed)
    torch.testing.assert_close(check.high, check.observed)
    assert len(check.edges) == len(check.observed) + 1 <= 42
    assert bool((check.edges.diff() > 0).all())
    assert check.edges[0] < observed.min()
    assert check.edges[-1] > observed.max()


def conjugate(n=4000, observations=30):
    """y ~ N(mu, 1), flat prior: leave-one-out predictions are N(mean of the others, 1 + 1/(N-1))."""
    y = torch.randn(observations, generator=generator(1), dtype=torch.float64)
    mu = y.mean() + torch.randn(n, generator=generator(2), dtype=torch.float64) / math.sqrt(observations)
    log_likelihood = -0.5 * (y - mu[:, None]) ** 2 - 0.5 * math.log(2 * math.pi)
    others = (y.sum() - y) / (observations - 1)
    exact = torch.distributions.Normal(others, math.sqrt(1 + 1 / (observations - 1))).log_prob(y)
    return y, mu, log_likelihood, exact


def test_leave_one_out_is_exact_where_it_is_known():
    _, _, log_likelihood, exact = conjugate()
    found = leave_one_out(log_likelihood)
    assert found.elpd == pytest.approx(float(exact.sum()), abs=0.05)
    assert found.se == pytest.approx(math.sqrt(30) * float(exact.std()), rel=0.02)
    assert found.parameters == pytest.approx(1, abs=0.3)
    assert found.unreliable == 0


def test_leave_one_out_takes_weighted_draws():
    y, mu, _, exact = conjugate()
    wide = y.mean() + 1.5 * (mu - y.mean())
    log_likelihood = -0.5 * (y - wide[:, None]) ** 2 - 0.5 * math.log(2 * math.pi)
    log_weight = log_likelihood.sum(1) + 0.5 * 30 * ((wide - y.mean()) / 1.5) ** 2
    assert leave_one_out(log_likelihood, log_weight).elpd == pytest.approx(float(exact.sum()), abs=0.05)


def test_an_outlier_is_named_unreliable():
    _, mu, log_likelihood, _ = conjugate()
    log_likelihood[:, 3] = -0.5 * (40.0 - mu) ** 2  # one point that pulls the posterior far
    assert leave_one_out(log_likelihood).unreliable == 1
