"""The network of the backward kernels."""

import torch

from hsivi_cli.networks.residual_score import ResidualScore


def network(transitions=3, inputs=4, outputs=2, factor=None):
    made = ResidualScore(inputs, outputs, transitions, torch.Generator().manual_seed(0))
    if factor is not None:
        made.factor.data.fill_(factor)
    return made


def test_starts_at_zero_and_only_its_factor_learns_at_first():
    made, x = network(), torch.randn(3, 5, 4).double()
    score = made(x)
    assert score.shape == (3, 5, 2)
    assert score.eq(0).all()
    score.sum().backward()
    moved = {name for name, parameter in made.named_parameters() if parameter.grad.abs().max() > 0}
    assert moved == {"factor"}


def test_every_transition_has_a_score_of_its_own():
    made = network(factor=1.0)
    same = torch.randn(1, 5, 4).double().expand(3, -1, -1)
    score = made(same)
    assert (score[0] - score[1]).abs().min() > 1e-6
    torch.testing.assert_close(made(same[:2]), score[:2])


def test_linearise_is_the_forward_pass_and_its_jacobian():
    made, x = network(factor=0.7), torch.randn(3, 5, 4).double().requires_grad_(True)
    score = made(x)
    weights = torch.randn(3, 5, 2).double()
    expected = torch.autograd.grad(score, x, weights)[0]
    for k in range(3):
        value, product = made.linearise(k, x[k].detach())
        torch.testing.assert_close(value, score[k].detach(), atol=1e-14, rtol=0)
        torch.testing.assert_close(product(weights[k]), expected[k], atol=1e-13, rtol=0)
        assert not value.requires_grad
