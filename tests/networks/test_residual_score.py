"""The network of the backward kernels."""

import torch
from torch.nn import functional

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
        value, product = made.linearise(k, x[k].detach().numpy())
        torch.testing.assert_close(torch.from_numpy(value), score[k].detach(), atol=1e-14, rtol=0)
        torch.testing.assert_close(torch.from_numpy(product(weights[k].numpy())), expected[k], atol=1e-13, rtol=0)


def test_backward_pass_agrees_with_autograd():
    made, x = network(factor=0.7), torch.randn(3, 5, 4).double().requires_grad_(True)

    def plain(x):
        hidden = torch.cat([x, made.embedding[:, None].expand(-1, 5, -1)], 2)
        hidden = hidden + functional.softplus(functional.linear(hidden, made.weight_1, made.bias_1))
        hidden = hidden + functional.softplus(functional.linear(hidden, made.weight_2, made.bias_2))
        return made.factor * functional.linear(hidden, made.weight_3, made.bias_3)

    weights, inputs = torch.randn(3, 5, 2).double(), (x, *made.parameters())
    torch.testing.assert_close(made(x), plain(x), atol=1e-13, rtol=0)
    ours, theirs = (torch.autograd.grad(run(x), inputs, weights) for run in (made, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_far_inputs_stay_finite():
    made = network(factor=0.7)
    x = torch.tensor([[[1e4, -1e4, 0, 1.0]]]).double().requires_grad_(True)
    value = made(x)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()
