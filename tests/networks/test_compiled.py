"""A compiled network gives the same numbers, and only for the batch size it began with is it compiled."""

import torch

from hsivi_cli.networks.compiled import CompiledNetwork


class Counting(torch.nn.Module):
    config = {"in_channels": 1, "sample_size": 4}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return torch.nn.functional.silu(self.conv(x)) * (1 + t)


def test_the_same_numbers_for_every_batch_size_and_time():
    net = Counting()
    compiled = CompiledNetwork(net)
    sizes = []
    compiled.compiled.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for n, t in ((4, 3), (4, 7), (1, 7)):
            x = torch.randn(n, 1, 4, 4, generator=generator)
            torch.testing.assert_close(compiled(x, torch.tensor(t)), net(x, torch.tensor(t)))
    assert sizes == [4, 4]
    assert compiled.config is net.config
