"""HSIVI-LB and HSIVI-SM as methods: gradient routing, bounds, draws, resuming, and a conjugate truth."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import hsivi_lb, hsivi_posterior, hsivi_sm_posterior
from hsivi_cli.targets.density import Density

F64 = torch.float64
LOG_Z = -2.5
TRUTH = MultivariateNormal(torch.tensor([0.5, -0.5], dtype=F64), torch.tensor([[0.6, 0.3], [0.3, 0.5]], dtype=F64))
CONJUGATE = Density("conjugate", 2, lambda z: LOG_Z + TRUTH.log_prob(z), log_z=LOG_Z)
METHODS = {"lb": hsivi_lb, "sm": hsivi_sm_posterior}
both = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def make(method, density=CONJUGATE, **kwargs):
    settings = {
        "layers": 2,
        "steps": 20,
        "batch": 16,
        "hidden": (8,),
        "components": 32,
        "paths": 4,
        "inner": 15,
    } | kwargs
    return method.init(density, method.Config(**settings))


def advance(method, state, steps):
    for _ in range(steps):
        metrics = method.step(state, None, generator(state.config.seed, Stream.TRAIN, state.step + 1))
    return metrics


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(before, module):
    return any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def gradients(module):
    return [p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters()]


@both
def test_untrained_chain_draws_the_base(method):
    state = make(method, layers=3, components=2048)
    draws = method.sample(state, NoiseStreams(1, range(4000)))
    assert draws.z.dtype == F64
    error = 1 / math.sqrt(4000)
    assert float(draws.z.mean(0).abs().max()) < 5 * error
    assert float((draws.z.var(0) - 1).abs().max()) < 5 * math.sqrt(2) * error
    torch.testing.assert_close(draws.log_prob, CONJUGATE.log_prob(draws.z))
    # the estimate of log q(x_0) against the truth, here N(0, I)
    exact = hsivi_posterior.log_base(draws.z)
    assert float((draws.log_approx - exact).abs().mean()) < 0.1
    assert draws.log_weight is None
    assert "J = 2048" in draws.note


@both
def test_a_draw_depends_on_its_stream_alone(method):
    state = make(method)
    advance(method, state, 3)
    many, few = method.sample(state, NoiseStreams(1, range(9))), method.sample(state, NoiseStreams(1, [7]))
    for name in ("z", "log_prob", "log_approx"):
        torch.testing.assert_close(getattr(many, name)[7:8], getattr(few, name), rtol=1e-12, atol=1e-12)


def test_layers_are_trained_without_a_gradient_through_their_input():
    state = make(hsivi_lb, layers=3)
    advance(hsivi_lb, state, 3)  # the residual nets start at zero: let them grow first
    passes = hsivi_posterior.roll_out(state.chain, range(3), 16, generator(0, Stream.TRAIN, 9))
    assert [done.number for done in passes] == [0, 1, 2]
    zeta = torch.randn(16, 2, dtype=F64)
    for done in passes:
        assert not any(each.requires_grad for each in (done.inputs, done.means, done.log_sigma))
        state.chain.layers.zero_grad(set_to_none=True)
        x = hsivi_posterior.redraw(state.chain, done, zeta).x
        torch.testing.assert_close(x.detach(), done.draw(zeta))
        x.square().sum().backward()
        for other, layer in enumerate(state.chain.layers):
            assert all(gradients(layer)) if other == done.number else not any(gradients(layer))


@pytest.mark.parametrize("varying", [False, True])
def test_gradient_of_a_layer_is_that_of_its_bound(varying):
    # J = all others: the sum over every way to draw, here many zeta for one rollout, against autograd of the bound
    state = make(hsivi_lb, layers=1, batch=64, inner=63, varying=varying, anneal=0.0)
    advance(hsivi_lb, state, 5)
    layer = state.chain.layer(0)
    draws = generator(0, Stream.TRAIN, 9)
    gaps, whole = [], []
    for _ in range(200):
        (done,) = hsivi_posterior.roll_out(state.chain, range(1), 64, draws)
        zeta = torch.randn((1, 64, 2), generator=draws, dtype=F64)
        ascent = hsivi_lb.ascent_at(state, [done], zeta)
        along = hsivi_posterior.move_along(state.chain, done, zeta[0], ascent.direction[0])
        mean, log_sigma = layer(done.inputs)
        x = mean + log_sigma.exp() * zeta[0]
        pairs = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(x.unsqueeze(1)).sum(-1)
        bound = (CONJUGATE.log_prob(x) - pairs.logsumexp(1) + math.log(64)).mean()
        torch.testing.assert_close(bound.detach(), ascent.bounds[0])
        autograd = torch.autograd.grad(bound, list(layer.parameters()))
        flat = [torch.cat([part.flatten() for part in parts]) for parts in (along, autograd)]
        gaps.append(flat[0] - flat[1])
        whole.append(flat[1])
    gap, error = torch.stack(gaps).mean(0), torch.stack(gaps).std(0) / math.sqrt(200)
    assert float((gap.abs() / error.clamp_min(1e-12)).max()) < 5
    # the gap is small beside the gradient itself, so that a wrong one would be seen
    assert float(error.norm()) < 0.3 * float(torch.stack(whole).mean(0).norm())


@both
def test_layer_by_layer_training_starts_at_the_base_and_leaves_the_others(method):
    state = make(method, layers=3, steps=10, training="layerwise", lr_schedule="constant")
    order = []
    for _ in range(10):
        before = [weights(layer) for layer in state.chain.layers]
        averages = [weights(layer) for layer in state.chain.averages]
        metrics = advance(method, state, 1)
        changed = [k for k in range(3) if moved(before[k], state.chain.layers[k])]
        assert changed == [k for k in range(3) if moved(averages[k], state.chain.averages[k])]
        order += changed
        assert math.isfinite(metrics["elbo"])
    assert order == sorted(order, reverse=True)
    assert set(order) == {0, 1, 2}
    config = method.Config(layers=2, steps=10, training="layerwise", warmup=0)
    rates = [hsivi_posterior.rate_at(1.0, step, config) for step in range(1, 11)]
    assert rates[:5] == rates[5:]
    assert rates[4] < 1e-12 < rates[0]


def test_critic_step_leaves_q_and_chain_step_leaves_the_critics():
    for divergence in ("fisher", "kl"):
        state = make(hsivi_sm_posterior, divergence=divergence)
        advance(hsivi_sm_posterior, state, 2)
        draws = generator(0, Stream.TRAIN, 5)
        passes = hsivi_posterior.roll_out(state.chain, range(2), 16, draws)
        q, critics = weights(state.chain.layers), weights(state.critics)
        hsivi_sm_posterior.critic_step(state, passes, draws)
        assert not moved(q, state.chain.layers)
        assert moved(critics, state.critics)
        critics = weights(state.critics)
        state.critics.zero_grad(set_to_none=True)
        hsivi_sm_posterior.chain_step(state, passes, draws)
        assert moved(q, state.chain.layers)
        assert not moved(critics, state.critics)
        assert not any(gradients(state.critics))


def test_fisher_gradient_at_the_best_critic_is_that_of_the_fisher_divergence():
    # One layer, mean W y + b by a network without hidden layers, and the critic put in closed form
    state = make(
        hsivi_sm_posterior,
        layers=1,
        hidden=(),
        critic_hidden=(),
        batch=200_000,
        base_dim=2,
        anneal=0.0,
        varying=False,
        divergence="fisher",
    )
    layer = state.chain.layers[0]
    with torch.no_grad():
        layer.net.net[0].weight.copy_(torch.tensor([[0.2, -0.3], [0.1, 0.4]], dtype=F64))
        layer.net.net[0].bias.copy_(torch.tensor([0.4, 0.3], dtype=F64))

    def closed_form(weight, bias, log_sigma):
        full = weight + layer.skip * torch.eye(2, dtype=F64)
        covariance = full @ full.T + torch.diag((2 * log_sigma).exp())
        precision = torch.linalg.inv(covariance)
        A, c = precision - TRUTH.precision_matrix, precision @ bias - TRUTH.precision_matrix @ TRUTH.loc
        return (A @ bias - c).square().sum() + (A @ covariance @ A.T).trace(), precision

    parameters = (layer.net.net[0].weight, layer.net.net[0].bias, layer.log_sigma)
    value, precision = closed_form(*parameters)
    expected = torch.autograd.grad(value, parameters)
    with torch.no_grad():
        # the network adds to the score of N(0, I) to give that of q
        state.critics[0].net[0].weight.copy_(torch.eye(2, dtype=F64) - precision)
        state.critics[0].net[0].bias.copy_(precision @ layer.net.net[0].bias)
    draws = generator(0, Stream.TRAIN, 1)
    passes = hsivi_posterior.roll_out(state.chain, range(1), 200_000, draws)
    state.step = 1
    zeta = torch.randn((1, 200_000, 2), generator=draws, dtype=F64)
    x = passes[0].draw(zeta[0]).unsqueeze(0)
    bridge, _, _ = hsivi_posterior.bridge_gradient(state.chain, CONJUGATE, state.config, 1, passes, x)
    found = (bridge - hsivi_sm_posterior._scores(state, x, passes)).detach().square().sum(-1).mean()
    assert abs(float(found - value.detach())) < 0.05 * float(value.detach())
    gradients = hsivi_sm_posterior._fisher_gradients(state, passes, zeta)
    by_name = dict(zip((name for name, _ in layer.named_parameters()), gradients[0], strict=True))
    order = ("net.net.0.weight", "net.net.0.bias", "log_sigma")
    for name, gradient in zip(order, expected, strict=True):
        assert float((by_name[name] + gradient).abs().max()) < 0.05 * float(gradient.abs().max())


@both
def test_one_layer_learns_a_conjugate_posterior_and_stays_below_the_evidence(method):
    settings = {"layers": 1, "steps": 300, "batch": 64, "hidden": (16,), "lr": 1e-2, "components": 1024, "inner": 63}
    if method is hsivi_sm_posterior:
        settings |= {"critic_hidden": (32,), "lr": 3e-3, "lr_critic": 1e-2}
    state = make(method, **settings)
    elbos = [advance(method, state, 1)["elbo"] for _ in range(300)]
    draws = method.sample(state, NoiseStreams(3, range(4000)))
    weight = draws.log_prob - draws.log_approx
    error = float(weight.std()) / math.sqrt(4000)
    assert float(weight.mean()) < LOG_Z + 4 * error
    assert float(weight.mean()) > LOG_Z - 0.1
    tail = torch.tensor(elbos[200:])
    assert float(tail.mean()) < LOG_Z + 4 * float(tail.std()) / 10
    assert float(tail.mean()) > elbos[0] + 0.2
    assert float((draws.z.mean(0) - TRUTH.loc).abs().max()) < 0.15
    assert float((draws.z.T.cov() - TRUTH.covariance_matrix).abs().max()) < 0.15
    torch.testing.assert_close((weight - LOG_Z).exp().mean(), torch.tensor(1.0, dtype=F64), rtol=0, atol=0.02)


@both
def test_bridges_go_from_the_base_to_the_target(method):
    state = make(method, layers=4, bridge_power=1.0, anneal=0.0)
    state.step = 1
    torch.testing.assert_close(state.chain.powers, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=F64))
    passes = hsivi_posterior.roll_out(state.chain, range(4), 16, generator(0, Stream.TRAIN, 1))
    x = torch.randn(4, 16, 2, dtype=F64, generator=generator(0, Stream.TRAIN, 2))
    found, log_p, log_target = hsivi_posterior.bridge_gradient(
        state.chain, CONJUGATE, state.config, state.step, passes, x
    )
    torch.testing.assert_close(log_target, CONJUGATE.log_prob(x.view(-1, 2)).view(4, 16))
    for k, power in enumerate((1.0, 0.75, 0.5, 0.25)):
        point = x[k].detach().requires_grad_(True)
        bridge = (1 - power) * hsivi_posterior.log_base(point) + power * CONJUGATE.log_prob(point)
        torch.testing.assert_close(found[k], torch.autograd.grad(bridge.sum(), point)[0])
        torch.testing.assert_close(log_p[k], bridge.detach())


@both
def test_density_of_one_component_is_the_draws_own(method):
    # J = 1 leaves q(x_0 | x_1) of the draw's own x_1, whose mean is the negative entropy of the layer's noise
    state = make(method, components=1, paths=0, sigma=0.3)
    log_approx = method.sample(state, NoiseStreams(2, range(4000))).log_approx
    expected = -2 * (math.log(0.3) + 0.5 + 0.5 * math.log(2 * math.pi))
    assert abs(float(log_approx.mean()) - expected) < 4 * float(log_approx.std()) / math.sqrt(4000)


def test_finished_layers_enter_as_their_averages():
    state = make(hsivi_lb, layers=3, training="layerwise")
    before = hsivi_posterior.roll_out(state.chain, range(1, 2), 5, generator(0, Stream.TRAIN, 1))[0].means
    with torch.no_grad():
        state.chain.layer(2).log_sigma.add_(1.0)  # as if it had moved on from its average
    after = hsivi_posterior.roll_out(state.chain, range(1, 2), 5, generator(0, Stream.TRAIN, 1))[0].means
    assert torch.equal(before, after)
    with torch.no_grad():
        state.chain.average(2).log_sigma.add_(1.0)
    assert not torch.equal(
        before, hsivi_posterior.roll_out(state.chain, range(1, 2), 5, generator(0, Stream.TRAIN, 1))[0].means
    )


def test_powers_rise_from_the_untrained_chain_to_the_bridges():
    config = hsivi_lb.Config(layers=3, steps=30, anneal=0.5)
    chain = hsivi_posterior.make_chain(2, config)
    powers = torch.stack([hsivi_posterior.powers_at(chain, step, config) for step in range(1, 31)])
    assert bool((powers.diff(dim=0) >= 0).all())
    assert float(powers[0].max()) < 0.01
    assert torch.equal(powers[14:], chain.powers.expand(16, 3))
    one_by_one = hsivi_lb.Config(layers=3, steps=30, anneal=0.5, training="layerwise")
    for k, first in ((2, 1), (1, 11), (0, 21)):
        # a layer starts at the bridge of its input and ends at its own
        below = chain.powers[k + 1] if k < 2 else 0.0
        ladder = [float(hsivi_posterior.powers_at(chain, step, one_by_one)[k]) for step in range(first, first + 10)]
        assert ladder == sorted(ladder)
        assert abs(ladder[0] - float(below)) < 0.05
        assert ladder[4] == ladder[-1] == float(chain.powers[k])


@both
def test_published_settings_make_a_fit(method):
    for dim in (2, 22, 751):
        target = Density("normal", dim, hsivi_posterior.log_base)
        state = method.init(target, method.Config(**method.published_settings(dim) | {"steps": 2, "batch": 4}))
        assert math.isfinite(advance(method, state, 2)["elbo"])
        assert method.sample(state, NoiseStreams(0, range(3))).z.shape == (3, dim)


@both
def test_resumed_run_is_the_straight_run(method):
    straight, first = make(method), make(method)
    advance(method, straight, 6)
    advance(method, first, 3)
    tree = copy.deepcopy(method.state_dict(first))
    resumed = make(method, seed=0)
    method.load_state_dict(resumed, tree)
    advance(method, resumed, 3)
    assert resumed.step == 6
    one, two = (method.sample(state, NoiseStreams(0, range(5))) for state in (straight, resumed))
    assert torch.equal(one.z, two.z)
    assert torch.equal(one.log_approx, two.log_approx)


@both
def test_bad_numbers_are_one_clear_line(method):
    for flag, settings in (("--layers", {"layers": 0}), ("--batch", {"batch": 1}), ("--sigma", {"sigma": 1.5})):
        with pytest.raises(InputError, match=flag):
            make(method, **settings)


def test_a_target_that_is_nan_stops_the_run():
    broken = Density("broken", 2, lambda z: z.sum(1) * float("nan"))
    with pytest.raises(RunError, match="diverged"):
        advance(hsivi_lb, make(hsivi_lb, broken), 1)


def test_a_chain_that_outruns_its_critic_stops_the_run():
    state = make(hsivi_sm_posterior)
    with torch.no_grad():
        state.chain.layer(0).net.net[-1].bias.fill_(1e5)
    with pytest.raises(RunError, match="ran ahead"):
        advance(hsivi_sm_posterior, state, 1)
