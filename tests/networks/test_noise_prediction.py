"""Whatever a network predicts, `predict_eps` gives the noise: closed forms, labels, learned variances."""

import pytest
import torch

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.networks.noise_prediction import PlainNetwork, class_count, predict_eps, sample_labels


class Oracle(torch.nn.Module):
    """Answers with a fixed tensor, or an object that has it, and remembers its arguments."""

    def __init__(self, answer, wrap=False):
        super().__init__()
        self.answer, self.wrap, self.seen = answer, wrap, None

    def forward(self, x, t, **more):
        self.seen = (t, more)
        return type("Output", (), {"sample": self.answer})() if self.wrap else self.answer


def noised(schedule, t):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    abar = schedule.abar[t].reshape(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps, x0, eps, abar


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_noise_comes_back_from_a_perfect_network(kind, wrap):
    schedule = schedule_from_config({"prediction_type": kind})
    t = torch.tensor([3, 500, 999])
    x, x0, eps, abar = noised(schedule, t)
    answer = {"epsilon": eps, "sample": x0, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[kind]
    found = predict_eps(Oracle(answer, wrap), x, t, schedule)
    # x_0 at time 3 is divided by a noise of 0.02
    torch.testing.assert_close(found.double(), eps, atol=2e-5 if kind == "sample" else 2e-6, rtol=0)


def test_v_agrees_with_the_formula_of_diffusers():
    from diffusers import DDPMScheduler

    schedule = schedule_from_config({"prediction_type": "v_prediction"})
    t = torch.tensor([3, 500, 999])
    x, x0, eps, _ = noised(schedule, t)
    velocity = DDPMScheduler(beta_end=0.02).get_velocity(x0, eps, t)
    torch.testing.assert_close(predict_eps(Oracle(velocity), x, t, schedule).double(), eps, atol=1e-4, rtol=0)


def test_learned_variances_are_left_out():
    schedule = schedule_from_config({})
    x, _, eps, _ = noised(schedule, torch.tensor([5, 6, 7]))
    answer = torch.cat([eps, torch.full_like(eps, 9.0)], 1)
    torch.testing.assert_close(predict_eps(Oracle(answer), x, 5, schedule).double(), eps, atol=1e-6, rtol=0)


def test_labels_reach_the_network_and_a_users_own_gets_one_time_a_sample():
    schedule = schedule_from_config({})
    x, _, eps, _ = noised(schedule, torch.tensor([5, 6, 7]))
    net = Oracle(eps)
    predict_eps(net, x, 5, schedule, torch.tensor([1, 2, 0]))
    assert net.seen[1]["class_labels"].tolist() == [1, 2, 0]
    predict_eps(PlainNetwork(net, (2, 4, 4), "net.py:build", ""), x, 5, schedule)
    assert net.seen[0].tolist() == [5, 5, 5]
    assert net.seen[1] == {}


def test_classes_of_samples_depend_on_their_own_number_alone():
    assert sample_labels(0, range(4)) is None
    assert sample_labels(3, [5, 6, 7]).tolist() == [2, 0, 1]
    assert sample_labels(3, [5, 6, 7], label=1).tolist() == [1, 1, 1]
    assert class_count(torch.nn.Identity()) == 0
