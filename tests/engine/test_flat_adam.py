"""Adam on one vector is Adam."""

import torch
from torch import nn

from hsivi_cli.engine.flat_adam import FlatAdam, flatten


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in ((3, 2), (), (4,))]


def loss(made):
    return made[0].sin().sum() * made[1] + (made[2] ** 4).sum()


def test_agrees_with_torch_and_scales_rates():
    ours, theirs = parameters(), parameters()
    optimiser = FlatAdam([(ours[:2], 1.0), (ours[2:], 10.0)])
    peer = torch.optim.Adam([{"params": theirs[:2], "lr": 1e-2}, {"params": theirs[2:], "lr": 1e-1}])
    for _ in range(20):
        optimiser.ascend(flatten(torch.autograd.grad(-loss(ours), ours)), 1e-2)
        peer.zero_grad()
        loss(theirs).backward()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_resumes_where_it_was():
    ours, again = parameters(), parameters()
    first, second = FlatAdam([(ours, 1.0)]), FlatAdam([(again, 1.0)])
    gradient = torch.randn(11).double()
    first.ascend(gradient, 0.1)
    second.load_state_dict(first.state_dict())
    for a, b in zip(again, ours, strict=True):
        a.data.copy_(b.data)
    for optimiser in (first, second):
        optimiser.ascend(2 * gradient, 0.1)
    for a, b in zip(again, ours, strict=True):
        assert torch.equal(a, b)


def test_a_group_begins_with_its_first_gradient():
    """As in torch, where a parameter without a gradient is passed over: its first step is the learning rate."""
    ours = parameters()
    optimiser = FlatAdam([(ours[:1], 1.0), (ours[1:], 1.0)])
    early, late = torch.ones(6).double(), torch.ones(5).double()
    for _ in range(500):
        optimiser.ascend(torch.cat([early, 0 * late]), 0.1)
    before = ours[2].detach().clone()
    optimiser.ascend(torch.cat([early, late]), 0.1)
    torch.testing.assert_close(ours[2].detach() - before, torch.full((4,), 0.1).double(), atol=1e-6, rtol=0)
