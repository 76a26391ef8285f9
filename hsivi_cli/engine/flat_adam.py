"""Adam on one long vector: a step costs a handful of kernels however many tensors there are."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

MEAN_DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8


class FlatAdam:
    """Adam (Kingma & Ba 2015) for many small parameters, which become views of one vector.

    Each group is its parameters and what their learning rate is multiplied by; gradients are handed over end to end, in
    the order of the groups. A group whose gradient has only been zero so far has not begun: its bias correction starts
    with its first gradient, as that of a parameter without one does in torch's Adam.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]]) -> None:
        parameters = [parameter for members, _ in groups for parameter in members]
        sizes = [parameter.numel() for parameter in parameters]
        self.vector = torch.cat([parameter.data.flatten() for parameter in parameters])
        for parameter, part in zip(parameters, self.vector.split(sizes), strict=True):
            parameter.data = part.view_as(parameter)
        self.scales = [scale for _, scale in groups]
        self.lengths = [sum(parameter.numel() for parameter in members) for members, _ in groups]
        self.mean, self.square = torch.zeros_like(self.vector), torch.zeros_like(self.vector)
        self.counts = [0 for _ in groups]

    @torch.no_grad()
    def ascend(self, gradient: Float[Tensor, " p"], rate: float) -> None:
        """Move up along `gradient`, the parameters' gradients end to end."""
        parts = (whole.split(self.lengths) for whole in (self.vector, self.mean, self.square, gradient))
        for group, (vector, mean, square, own) in enumerate(zip(*parts, strict=True)):
            if not self.counts[group] and not bool(own.any()):
                continue
            self.counts[group] += 1
            mean.lerp_(own, 1 - MEAN_DECAY)
            square.mul_(SQUARE_DECAY).addcmul_(own, own, value=1 - SQUARE_DECAY)
            unbiased = math.sqrt(1 - SQUARE_DECAY ** self.counts[group])
            step = rate * self.scales[group] * unbiased / (1 - MEAN_DECAY ** self.counts[group])
            vector.addcdiv_(mean, square.sqrt().add_(EPSILON * unbiased), value=step)

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts; the vector is its owners' business."""
        return {"mean": self.mean, "square": self.square, "counts": list(self.counts)}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.mean.copy_(tree["mean"])
        self.square.copy_(tree["square"])
        self.counts = [int(count) for count in tree["counts"]]


def flatten(gradients: Sequence[Tensor]) -> Float[Tensor, " p"]:
    """Gradients end to end."""
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
