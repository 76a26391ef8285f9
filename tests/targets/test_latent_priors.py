"""Priors of latents: densities integrate to 1, are those of the samplers, and have the gradients they should."""

import itertools
import math

import pytest
import torch

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets.latent_priors import (
    GUARDS,
    LEVELS,
    PRIORS,
    WIDEST,
    ClusterPrior,
    LatentPrior,
    Narrowing,
    make_prior,
)
from hsivi_cli.targets.latent_shapes import Pinwheel, Square, SwissRoll

DOUBLE = torch.float64
NAMES = list(PRIORS)
BROAD = [f"broad {name}" for name in WIDEST]


def cluster_prior() -> ClusterPrior:
    prior = ClusterPrior(4, 2, torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
        prior.log_scale.copy_(torch.tensor([-2.0, -1.0, -1.5, 0.0]))
    return prior


def prior_of(name: str) -> LatentPrior:
    if name == "clusters":
        return cluster_prior()
    prior = make_prior(name.removeprefix("broad "), 2)
    if name.startswith("broad"):
        assert isinstance(prior, Narrowing)
        prior.approach(0.4)
    return prior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_integral(prior: LatentPrior, reach: float, step: float) -> float:
    axis = torch.arange(-reach, reach, step, dtype=DOUBLE) + step / 2
    total = 0.0
    for rows in axis.split(200):
        density = prior.log_prob(torch.stack(torch.meshgrid(rows, axis, indexing="ij"), -1)).detach().exp()
        total += float(density.sum()) * step**2
    return total


@pytest.mark.parametrize(
    ("name", "reach", "step"),
    [("normal", 6, 0.1), ("swiss-roll", 3.8, 0.06), ("square", 1.5, 0.005), ("mixture", 4.5, 0.03),
     ("clusters", 6, 0.03), ("broad pinwheel", 2.5, 0.02), ("broad square", 2, 0.01), ("broad swiss-roll", 5, 0.05),
     ("broad mixture", 5, 0.03)],
)  # fmt: skip
def test_a_density_integrates_to_one(name, reach, step):
    assert grid_integral(prior_of(name), reach, step) == pytest.approx(1, abs=1e-3)


def test_the_pinwheels_density_integrates_to_one():
    """In polar coordinates; ten arms are one turned by a tenth, so that a tenth of the circle is enough."""
    prior = Pinwheel()
    r = torch.arange(0.3, 1.8, 0.006, dtype=DOUBLE)
    angle = torch.arange(200, dtype=DOUBLE) / 200 * 2 * math.pi / 10
    mesh_r, mesh_angle = torch.meshgrid(r, angle, indexing="ij")
    density = prior.log_prob(torch.stack((mesh_r * mesh_angle.cos(), mesh_r * mesh_angle.sin()), -1)).exp()
    cell = 0.006 * 2 * math.pi / 200  # ten times a tenth
    assert float((density * mesh_r).sum()) * cell == pytest.approx(1, abs=1e-3)


def test_entropies_are_those_of_the_study():
    z = Pinwheel().sample(20_000, generator()).double()
    found = -Pinwheel().log_prob(z)
    assert float(found.mean()) == pytest.approx(-2.055, abs=4 * float(found.std()) / 20_000**0.5)
    # .685 is the square's without the overlap of its sides at the corners, H(z | side) + log 4; with it, .639
    assert math.log(8) + 0.5 * math.log(2 * math.pi * math.e * 0.06**2) == pytest.approx(0.685, abs=1e-3)
    thin = Square(2, 3.0, along=1e-3)
    found = -thin.log_prob(thin.sample(40_000, generator(1)).double())
    assert float(found.mean()) == pytest.approx(0.639, abs=4 * float(found.std()) / 200)


def test_standard_deviations_are_those_of_the_study():
    def sds(prior: LatentPrior) -> list[float]:
        return prior.sample(100_000, generator()).double().std(0).tolist()

    assert sds(Pinwheel()) == pytest.approx([0.72, 0.72], abs=0.01)
    assert sds(SwissRoll(2, 0.1)) == pytest.approx([1.42, 1.51], abs=0.02)
    assert sds(make_prior("square", 2)) == pytest.approx([0.82, 0.82], abs=0.01)


@pytest.mark.parametrize("name", [*NAMES, "clusters", *BROAD])
def test_samplers_and_densities_agree(name):
    """A kernel estimate from draws, at a few points, against the exact density smoothed by the same kernel."""
    prior, width = prior_of(name), 0.08
    z = prior.sample(60_000, generator(1)).double().detach()
    at = prior.sample(8, generator(2)).double().detach() + 0.03 * torch.randn(
        8, 2, generator=generator(3), dtype=DOUBLE
    )
    kernel = (-0.5 * (z[:, None] - at).square().sum(-1) / width**2).exp() / (2 * math.pi * width**2)
    estimate, error = kernel.mean(0), kernel.std(0) / len(z) ** 0.5
    # the same integral over a fine grid around each point
    step = 0.01 if name == "swiss-roll" else 0.004
    axis = torch.arange(-4 * width, 4 * width, step, dtype=DOUBLE) + step / 2
    offset = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    weight = (-0.5 * offset.square().sum(-1) / width**2).exp() / (2 * math.pi * width**2) * step**2
    for point, found, spread in zip(at[:4], estimate, error, strict=False):
        exact = float((prior.log_prob(point + offset).detach().exp() * weight).sum())
        assert abs(float(found) - exact) < 5 * float(spread) + 1e-3 * exact


@pytest.mark.parametrize("name", ["pinwheel", "swiss-roll", "square", "mixture", *BROAD])
def test_the_whole_is_the_equal_mixture_of_the_classes(name):
    prior = prior_of(name)
    z = prior.sample(500, generator()).double()
    mixed = prior.log_prob_class(z).logsumexp(-1) - math.log(prior.classes)
    assert torch.allclose(mixed, prior.log_prob(z), atol=1e-9)
    k = torch.arange(prior.classes).repeat_interleave(50)
    own = prior.log_prob_class(prior.sample_class(k, generator(1)).double()).argmax(-1)
    assert (own == k).double().mean() > 0.8


@pytest.mark.parametrize("name", WIDEST)
def test_a_thin_prior_is_approached_from_a_broad_one_and_reached_exactly(name):
    prior = make_prior(name, 2)
    assert isinstance(prior, Narrowing)
    exact, off = prior.exact, prior.exact.sample(400, generator()).double() + 0.2
    entropies, lowest = [], []
    for level in range(LEVELS + 1):
        prior.approach(level / LEVELS)
        entropies.append(float(-prior.log_prob(prior.sample(4000, generator()).double()).mean()))
        lowest.append(float(prior.log_prob(off).mean()))
    assert all(after < before + 0.02 for before, after in itertools.pairwise(entropies))
    assert lowest[0] > lowest[-1]
    assert entropies[0] - entropies[-1] > 0.3
    assert torch.equal(prior.log_prob(off), exact.log_prob(off))
    prior.approach(-1.0)
    assert float(prior.log_prob(off).mean()) == lowest[0]
    assert torch.equal(make_prior(name, 2).log_prob(off), exact.log_prob(off))


@pytest.mark.parametrize("name", WIDEST)
def test_rows_off_a_thin_prior_cost_little_and_are_drawn_back(name):
    prior, bare = make_prior(name, 2), make_prior(name, 2).exact.inner
    on = prior.sample(500, generator()).double()
    assert float((prior.log_prob(on) - bare.log_prob(on)).abs().median()) < 2e-3
    fine = WIDEST[name][1]
    z = (bare.sample(200, generator(1)).double() + 8 * fine / 2**0.5).requires_grad_()
    found = prior.log_prob(z)
    assert float(found.detach().min()) > float(bare.log_prob(z.detach()).min())
    assert float(prior.log_prob(on).mean() - found.detach().min()) < 40
    (gradient,) = torch.autograd.grad(found.sum(), z)
    moved = z.detach() + 0.1 * fine * gradient / gradient.norm(dim=1, keepdim=True)
    assert (prior.log_prob(moved) > found.detach() - 1e-9).double().mean() > 0.98
    draws = prior.sample(400_000, generator(2))
    (width, share), *_ = GUARDS[name]
    counted = prior.exact._choose(
        [torch.zeros(400_000, 1), *(torch.ones(400_000, 1),) * len(GUARDS[name])], generator(3)
    )
    wanted = sum(share for _, share in GUARDS[name])
    assert abs(float(counted.mean()) - wanted) < 5 * (wanted / 400_000) ** 0.5
    assert draws.shape == (400_000, 2)
    assert width > fine
    assert share < 0.01


def test_a_learned_prior_weighs_its_clusters_and_its_draws_follow_its_heads():
    prior = cluster_prior()
    z = prior.sample(400, generator()).detach()
    mixed = (prior.log_prob_class(z) + prior.log_weights).logsumexp(-1)
    assert torch.allclose(mixed, prior.log_prob(z), atol=1e-12)
    prior.sample_class(torch.tensor([2, 2, 0]), generator()).sum().backward()
    assert prior.heads.grad is not None
    assert prior.heads.grad.sum(1).tolist() == [2.0, 0.0, 4.0, 0.0]
    assert prior.log_scale.grad is not None
    assert (prior.log_scale.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("name", [*NAMES, "clusters", *BROAD])
def test_gradients_are_those_of_finite_differences(name):
    prior = prior_of(name)
    z = prior.sample(40, generator()).double().detach()
    z = torch.cat((z, z + 0.05 * torch.randn(40, 2, generator=generator(1), dtype=DOUBLE))).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(z).sum(), z)
    step = 1e-6
    for axis in range(2):
        shift = step * torch.eye(2, dtype=DOUBLE)[axis]
        with torch.no_grad():
            difference = (prior.log_prob(z + shift) - prior.log_prob(z - shift)) / (2 * step)
        scale = 1 + gradient.abs().amax()
        assert float((difference - gradient[:, axis]).abs().max() / scale) < 1e-6


@pytest.mark.parametrize("name", [*NAMES, "clusters"])
def test_far_away_and_at_the_origin_all_is_finite(name):
    z = torch.cat((torch.zeros(1, 2), 1.2 * torch.randn(500, 2, generator=generator()))).double().requires_grad_()
    log_prob = prior_of(name).log_prob(z)
    (gradient,) = torch.autograd.grad(log_prob.sum(), z)
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(gradient).all()


def test_the_pinwheels_roots_are_solutions():
    prior = Pinwheel()
    z = 0.5 * torch.randn(300, 2, generator=generator(), dtype=DOUBLE)
    turn = 2 * math.pi * torch.arange(10, dtype=DOUBLE) / 10
    f1 = prior._roots(z, turn)
    angle = turn + 0.25 * f1.exp()
    near = z.norm(dim=-1) < 1.6
    residual = (f1 - z[:, :1] * angle.cos() + z[:, 1:] * angle.sin())[near]
    assert residual.abs().max() < 1e-12
    # a draw's own root is the f1 that made it
    made = prior.sample_class(torch.full((50,), 3), generator(1))
    own = prior.log_prob_class(made.double()).argmax(-1)
    assert (own == 3).all()


def bisected(prior: Pinwheel, z: torch.Tensor) -> torch.Tensor:
    """f1 of each arm, (n, K), by bisections alone: of the beginning of the rising stretch, then of the root on it."""
    turn = 2 * math.pi * torch.arange(prior.classes, dtype=DOUBLE) / prior.classes
    r = z.norm(dim=-1, keepdim=True)

    def rise(phi):
        return phi - prior.twist * (r * phi.cos()).exp()

    low = -torch.acos(2 * r / (1 + (1 + 4 * r.square()).sqrt()))
    high = torch.zeros_like(low)
    for _ in range(60):
        middle = 0.5 * (low + high)
        rising = 1 + prior.twist * (r * middle.cos()).exp() * r * middle.sin() > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    target = rise(high) + torch.remainder(torch.atan2(z[:, 1:], z[:, :1]) + turn - rise(high), 2 * math.pi)
    low, high = high.expand_as(target), (high + 2 * math.pi).expand_as(target)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = rise(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return r * low.cos()


def test_the_pinwheels_roots_are_those_of_bisections_however_far():
    prior = Pinwheel()
    r, angle = torch.rand(2, 20_000, 1, generator=generator(5), dtype=DOUBLE) * torch.tensor([[[5.0]], [[2 * math.pi]]])
    for z in (torch.cat((r * angle.cos(), r * angle.sin()), -1), prior.sample(5000, generator(6)).double()):
        turn = 2 * math.pi * torch.arange(10, dtype=DOUBLE) / 10
        wanted, found = bisected(prior, z), prior._roots(z, turn)
        assert float((found - wanted).abs().max()) < 1e-11
        assert float((found - wanted).abs()[z.norm(dim=-1) < 1.6].max()) < 1e-13
    far = (1e3 * torch.ones(3, 2, dtype=DOUBLE)).requires_grad_()
    assert torch.isfinite(torch.autograd.grad(prior.log_prob(far).sum(), far)[0]).all()


@pytest.mark.parametrize("prior", [Pinwheel(), SwissRoll(3)], ids=["pinwheel", "swiss-roll"])
def test_gradients_of_each_class_can_be_differentiated_again(prior):
    """As semi-amortised training does, which differentiates through steps along the gradient."""
    z = (prior.sample(6, generator()).double() + 0.02).requires_grad_()
    weight = torch.randn(prior.classes, generator=generator(1), dtype=DOUBLE)

    def mixed(z):
        return (prior.log_prob_class(z) * weight).sum(-1) / 1e3

    assert torch.autograd.gradcheck(mixed, z, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradgradcheck(mixed, z, atol=1e-4, rtol=1e-4)


def test_the_rolls_quadrature_has_converged():
    z = SwissRoll().sample(300, generator()).double()
    z = torch.cat((z, z + 0.2))
    assert torch.allclose(SwissRoll().log_prob(z), SwissRoll(nodes=400).log_prob(z), atol=1e-6)


@pytest.mark.parametrize("dim", [3, 4])
def test_rolls_and_squares_in_more_dimensions(dim):
    roll = SwissRoll(dim)
    z = roll.sample(200, generator()).double()
    beside = -0.5 * (z[:, 2:] / 0.1).square().sum(-1) - (dim - 2) * (0.5 * math.log(2 * math.pi) + math.log(0.1))
    assert torch.allclose(roll.log_prob(z), SwissRoll().log_prob(z[:, :2]) + beside, atol=1e-8)
    cube = Square(dim)
    z = cube.sample(20_000, generator()).double()
    on_edge = ((z.abs() - 1).abs() < 0.3).sum(-1)
    assert (on_edge >= dim - 1).double().mean() > 0.999
    # E_p[q / p] = 1 for any density q that p covers: here the cube with narrower noise
    narrow = Square(dim, level=2.0)
    weight = (narrow.log_prob(z) - cube.log_prob(z)).exp()
    assert abs(float(weight.mean()) - 1) < 5 * float(weight.std()) / len(z) ** 0.5
    assert cube.classes == 1


def test_types_and_draws():
    for name in NAMES:
        prior = make_prior(name, 2)
        z = prior.sample(7, generator())
        assert z.dtype == torch.float32
        assert prior.log_prob(z).dtype == torch.float32
        assert prior.log_prob(z.reshape(7, 1, 2).expand(7, 3, 2)).shape == (7, 3)
        assert prior.log_prob_class(z).shape == (7, prior.classes)
        assert torch.equal(z, prior.sample(7, generator()))


def test_what_is_refused():
    for name, dim, words in (
        ("ring", 2, "there is no prior"),
        ("pinwheel", 3, "two dimensions, not 3"),
        ("square", 1, "two dimensions or more"),
    ):
        with pytest.raises(InputError, match=words):
            make_prior(name, dim)
    with pytest.raises(InputError, match="clusters 1"):
        ClusterPrior(1, 2)


def test_the_pinwheels_density_is_that_of_the_change_of_variables():
    """With wide arms, where the Jacobian differs from 1; its integral cannot tell, since its mean over f2 is 1."""
    prior = Pinwheel()
    prior.across = 0.1

    def forward(f: torch.Tensor) -> torch.Tensor:
        angle = 2 * math.pi * 3 / 10 + 0.25 * f[0].exp()
        return torch.stack((f[0] * angle.cos() + f[1] * angle.sin(), f[1] * angle.cos() - f[0] * angle.sin()))

    for f in torch.tensor([[1.1, 0.15], [0.8, -0.2], [1.0, 0.0]], dtype=DOUBLE):
        normal = -0.5 * (((f[0] - 1) / 0.15) ** 2 + (f[1] / 0.1) ** 2) - math.log(2 * math.pi * 0.15 * 0.1)
        wanted = normal - torch.autograd.functional.jacobian(forward, f).det().abs().log()
        assert float(prior.log_prob_class(forward(f))[3]) == pytest.approx(float(wanted), abs=1e-9)


def test_a_broad_cluster_prior_is_standard_normal_until_it_is_placed():
    prior, normal = ClusterPrior(5, 2, generator(1)), make_prior("normal", 2)
    prior.broaden()
    z = torch.randn(40, 2, generator=generator(2))
    torch.testing.assert_close(prior.log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(prior.log_prob_class(z), normal.log_prob(z)[:, None].expand(-1, 5))
    drawn = prior.sample(20_000, generator(3))
    assert float(drawn.mean(0).abs().max()) < 5 / math.sqrt(20_000)
    assert torch.allclose(drawn.var(0), torch.ones(2), atol=5 * math.sqrt(2 / 20_000))
    assert torch.autograd.grad(
        prior.log_prob(z.requires_grad_()).sum(), list(prior.parameters()), allow_unused=True
    ) == (None, None, None)


def test_placed_clusters_are_those_of_the_latents():
    truth = cluster_prior()
    with torch.no_grad():  # apart, so that the likelihood has one maximum that matters
        truth.heads.copy_(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]]))
    latents = truth.sample(3000, generator(4)).detach()
    prior = ClusterPrior(4, 2, generator(5))
    prior.broaden()
    before = prior.log_prob(latents).mean()
    prior.place(latents, 0)
    found, best = (float(p.log_prob(latents.double()).mean().detach()) for p in (prior, truth))
    assert found > best - 1e-3  # the maximum of the likelihood is above the truth's own
    assert found < best + 0.02
    assert found > float(before) + 0.5
    order = truth.log_scale.argsort(), prior.log_scale.argsort()
    torch.testing.assert_close(prior.log_weights[order[1]].double(), truth.log_weights[order[0]], atol=0.15, rtol=0)
    copy = ClusterPrior(4, 2)
    copy.broaden()
    copy.load_state_dict(prior.state_dict())
    torch.testing.assert_close(copy.log_prob(latents), prior.log_prob(latents))


def test_clusters_cannot_be_placed_on_too_few_latents():
    with pytest.raises(InputError, match="--clusters 4: there are only 3 rows"):
        cluster_prior().place(torch.zeros(3, 2), 0)
    with pytest.raises(RunError, match="diverged"):
        cluster_prior().place(torch.full((9, 2), math.nan), 0)
