"""Training a score network: the optimum on Gaussian data is closed form, flips and EMA do what they say."""

import torch

from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.methods import ddpm
from hsivi_cli.methods.training import unet_arguments

UNET = unet_arguments((1, 4, 4), (8,), 1, False)


def config(**settings):
    return ddpm.DDPMConfig(
        **({"unet": UNET, "schedule": {"num_train_timesteps": 50}, "steps": 4, "batch": 4} | settings)
    )


class LinearNet(torch.nn.Module):
    """`eps = slope[t] * x`: the exact family for Gaussian data."""

    def __init__(self, total):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(total))

    def forward(self, x, t):
        return type("Output", (), {"sample": self.slope[t].reshape(-1, 1, 1, 1) * x})()


def test_loss_leads_to_the_closed_form_on_gaussian_data():
    state = ddpm.init(None, config(steps=4000, batch=256, lr=2e-2, warmup=1, clip=1e9))
    state.unet, state.ema = LinearNet(50), LinearNet(50)
    state.optimiser = torch.optim.Adam(state.unet.parameters(), 2e-2)
    # two grey levels, +-1/3 about the middle: second moment v = 1/9, and the best linear eps is s x / (abar v + s^2)
    levels = torch.tensor([85, 170], dtype=torch.uint8)
    for _ in range(1500):
        draws = generator(0, Stream.TRAIN, state.step + 1)
        ddpm.step(state, levels[torch.randint(0, 2, (256, 1, 2, 2), generator=draws)], draws)
    abar = state.schedule.abar
    s = (1 - abar).sqrt()
    expected = (s / (abar * (1 / 3) ** 2 + s**2)).float()
    error = (state.unet.slope - expected).abs() / expected
    assert error[10:].max() < 0.1
    assert (state.unet.slope[40:] / s[40:].float() > 1.0).all()  # eps = s x would be the answer for v = 1


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = ddpm.init(None, config())

    torch.manual_seed(2)
    b, c = ddpm.init(None, config()), ddpm.init(None, config(seed=1))
    weights = [torch.cat([p.flatten() for p in s.unet.parameters()]) for s in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_flips_mirror_about_half_of_the_images():
    state = ddpm.init(None, config(flip=True, batch=64))
    images = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            seen.append(x)
            return type("Output", (), {"sample": self.w * x})()

    state.unet, state.ema = Recorder(), Recorder()
    state.optimiser = torch.optim.Adam(state.unet.parameters())
    state.schedule = type(state.schedule)(torch.ones(50, dtype=torch.float64) - 1e-12)
    ddpm.step(state, images, generator(0, Stream.TRAIN, 1))
    mirrored = (seen[0][:, 0, 0, 3] > 0).float().mean()
    assert 0.25 < mirrored < 0.75


def test_preview_is_finite_and_reproducible():
    state = ddpm.init(None, config(schedule={}))
    draws = [ddpm.sample(state, PhiloxStreams(0, range(2))) for _ in range(2)]
    assert draws[0].shape == (2, 1, 4, 4)
    assert torch.equal(*draws)
    assert bool(draws[0].isfinite().all())
