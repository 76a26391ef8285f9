"""One call for any score network: `predict_eps(net, x, t, schedule, labels)`, whatever the network itself predicts.

With `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`, a network that predicts x_0, or `v = sqrt(abar_t) eps -
sqrt(1 - abar_t) x_0` (Salimans and Ho 2022, arXiv 2202.00512), predicts eps as well. A network with learned variances
(Nichol and Dhariwal 2021, arXiv 2102.09672) gives them in further channels behind the image's, which no sampler here
uses.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hsivi_cli.bridges.schedule import NoiseSchedule


def predict_eps(
    net: nn.Module,
    x: Float[Tensor, " n *shape"],
    t: Int[Tensor, " n"] | Int[Tensor, ""] | int,
    schedule: NoiseSchedule,
    labels: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, " n *shape"]:
    """The noise in `x` at time `t`, float32; `labels` are the classes of a class-conditional network.

    The network answers with a tensor, or with an object that has one as `sample` (diffusers).
    """
    t = torch.as_tensor(t, device=x.device)
    out = net(x, t) if labels is None else net(x, t, class_labels=labels)
    out = getattr(out, "sample", out).float()
    if schedule.prediction_type == "epsilon":  # asks for no schedule, which would be copied to the device each time
        return out[:, : x.shape[1]]
    abar = schedule.abar.to(x.device)[t.expand(x.shape[0])].reshape(-1, *[1] * (x.ndim - 1))
    return to_eps(out, x, abar, schedule.prediction_type)


def to_eps(
    out: Float[Tensor, "n c_out *shape"],
    x: Float[Tensor, "n c *shape"],
    abar: Float[Tensor, "*n_or_1 #c"],
    prediction_type: str,
) -> Float[Tensor, "n c *shape"]:
    """The noise in `x` from a network's output there, which may have further channels behind those of `x`."""
    out = out[:, : x.shape[1]]
    if prediction_type == "epsilon":
        return out
    signal, noise = abar.sqrt().to(x.dtype), (1 - abar).sqrt().to(x.dtype)
    if prediction_type == "v_prediction":
        return signal * out + noise * x
    return (x - signal * out) / noise  # it predicts x_0


def class_count(net: nn.Module) -> int:
    """How many classes a network is conditioned on; 0 if it is not."""
    config: Any = getattr(net, "config", {})
    return int(config.get("num_class_embeds") or config.get("label_dim") or 0)


def sample_labels(
    classes: int, indices: Iterable[int], label: int | None = None, device: torch.device | str = "cpu"
) -> Int[Tensor, " n"] | None:
    """The classes of the samples `indices`: all `label`, or sample j is of class `j mod classes`; None without any."""
    if not classes:
        return None
    wanted = [j % classes if label is None else label for j in indices]
    return torch.tensor(wanted, dtype=torch.int64, device=device)


class PlainNetwork(nn.Module):
    """A user's own module behind the little that is asked of a network: a `config` with the image's shape.

    `net` is called as `net(x, t)`, t of shape (n,), and answers with the prediction, shape of x or with more channels.
    """

    def __init__(self, net: nn.Module, shape: tuple[int, int, int], origin: str, origin_sha256: str) -> None:
        super().__init__()
        self.net = net
        self.shape = shape
        self.config = {
            "_class_name": PLAIN,
            "in_channels": shape[0],
            "sample_size": list(shape[1:]),
            "network": origin,
            "network_sha256": origin_sha256,
        }

    def forward(self, x: Float[Tensor, "n c h w"], t: Int[Tensor, " n"] | Int[Tensor, ""]) -> Tensor:
        """What the network answers, told one time a sample, in a tensor of its own: it may write into it."""
        # len(x) would be a constant to those who trace it
        return self.net(x, t.expand(x.shape[0]).clone(memory_format=torch.contiguous_format))


PLAIN = "hsivi_cli.PlainNetwork"
