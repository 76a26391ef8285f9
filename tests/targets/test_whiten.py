"""Whitening is a change of coordinates: same evidence, same gradient rule, same quantities for the user."""

import math

import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.targets.density import Density, Predictive
from hsivi_cli.targets.whiten import Affine, whiten

DIM = 3
LOCATION = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TRIL = torch.tensor([[2.0, 0.0, 0.0], [0.3, 0.5, 0.0], [-1.0, 0.2, 1.5]], dtype=torch.float64)
SCALES = {"dense": TRIL, "diagonal": TRIL.diagonal().clone()}


def quartic(z):
    return -(z**4).sum(1) / 4 + z[:, 0] * z[:, 1]


def quartic_gradient(z):
    return -(z**3) + torch.stack([z[:, 1], z[:, 0], torch.zeros(len(z), dtype=z.dtype)], 1)


def model(analytic=True):
    def simulate(z, generator):
        return z.sum(1, keepdim=True) + torch.randn(len(z), 4, generator=generator, dtype=torch.float64)

    def condition(response):
        return Density("conditioned", DIM, lambda z: quartic(z) + response.sum() * z[:, 0])

    predictive = Predictive(
        observed=torch.arange(4.0, dtype=torch.float64),
        simulate=simulate,
        log_likelihood=lambda z: z[:, :1] * torch.ones(4, dtype=torch.float64),
        prior=lambda n, generator: torch.randn(n, DIM, generator=generator, dtype=torch.float64),
        condition=condition,
    )
    return Density(
        "quartic",
        DIM,
        quartic,
        constrain=lambda z: {"beta": z[:, :2], "sigma": z[:, 2].exp()},
        analytic_gradient=quartic_gradient if analytic else None,
        predictive=predictive,
        exact_draws=lambda n, generator: torch.randn(n, DIM, generator=generator, dtype=torch.float64),
        initial=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    )


@pytest.fixture(params=SCALES)
def scale(request):
    return SCALES[request.param]


def points(n=5, seed=0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_log_prob_carries_the_jacobian_and_everything_shown_stays(scale):
    density, u = model(), points()
    white, z = whiten(density, LOCATION, scale), Affine(LOCATION, scale).forward(points())
    same(white.log_prob(u), density.log_prob(z) + math.log(2.0 * 0.5 * 1.5))
    for name, value in density.constrain(z).items():
        same(white.constrain(u)[name], value)


@pytest.mark.parametrize("analytic", [True, False])
def test_gradient_is_the_pulled_back_one_and_differentiable(scale, analytic):
    white = whiten(model(analytic), LOCATION, scale)
    assert (white.analytic_gradient is not None) == analytic
    u = points().requires_grad_(True)
    (by_autograd,) = torch.autograd.grad(white.log_prob(u).sum(), u)
    same(white.gradient(u).detach(), by_autograd)
    assert torch.autograd.gradcheck(white.gradient, (u,))


def test_affine_round_trip(scale):
    affine = Affine(LOCATION, scale)
    same(affine.inverse(affine.forward(points())), points())
    jacobian = torch.autograd.functional.jacobian(lambda u: affine.forward(u[None])[0], points(1)[0])
    same(affine.log_det, jacobian.det().log())


def test_the_predictive_sees_z_and_the_prior_comes_back_as_u(scale):
    density = model()
    white = whiten(density, LOCATION, scale)
    affine, u = Affine(LOCATION, scale), points()
    before, after = density.predictive, white.predictive
    pair = [torch.Generator().manual_seed(3) for _ in range(2)]
    same(after.simulate(u, pair[0]), before.simulate(affine.forward(u), pair[1]))
    same(after.log_likelihood(u), before.log_likelihood(affine.forward(u)))
    same(affine.forward(after.prior(4, pair[0])), before.prior(4, pair[1]))
    same(affine.forward(white.exact_draws(4, pair[0])), density.exact_draws(4, pair[1]))
    same(affine.forward(white.initial[None])[0], density.initial)
    response = torch.ones(4, dtype=torch.float64)
    theirs = before.condition(response).log_prob(affine.forward(u)) + affine.log_det
    same(after.condition(response).log_prob(u), theirs)


def test_what_is_absent_stays_absent():
    white = whiten(Density("bare", DIM, quartic), LOCATION, TRIL)
    assert white.predictive is None
    assert white.exact_draws is None
    assert white.initial is None


@pytest.mark.parametrize(
    ("location", "scale"),
    [
        (LOCATION[:2], TRIL),
        (LOCATION, TRIL[:2]),
        (LOCATION, TRIL.T.contiguous()),
        (LOCATION * math.nan, TRIL),
        (LOCATION, torch.zeros(3, dtype=torch.float64)),
    ],
)
def test_impossible_maps_are_refused(location, scale):
    with pytest.raises(InputError, match="whiten"):
        whiten(model(), location, scale)


def test_linearised_gradients_are_the_gradient_and_the_hessian_in_both_coordinates():
    from hsivi_cli.targets.examples.logistic import logistic_density

    draws = torch.Generator().manual_seed(0)
    design = torch.randn(30, 4, generator=draws, dtype=torch.float64)
    y = (torch.rand(30, generator=draws) < 0.4).double()
    density = logistic_density(design, y)
    scale = torch.randn(4, 4, generator=draws, dtype=torch.float64).tril() + 3 * torch.eye(4, dtype=torch.float64)
    for target in (
        density,
        whiten(density, torch.ones(4, dtype=torch.float64), scale),
        whiten(density, y[:4], y[:4] + 2),
    ):
        z = 0.3 * torch.randn(5, 4, generator=draws, dtype=torch.float64)
        v = torch.randn(5, 4, generator=draws, dtype=torch.float64)
        gradient, product = target.linearise(z.numpy())
        point = z.clone().requires_grad_(True)
        exact = torch.autograd.grad(target.log_prob(point).sum(), point, create_graph=True)[0]
        turned = torch.autograd.grad((exact * v).sum(), point)[0]
        assert torch.allclose(torch.from_numpy(gradient), exact.detach(), atol=1e-10)
        assert torch.allclose(torch.from_numpy(product(v.numpy())), turned, atol=1e-10)
