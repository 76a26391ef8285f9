"""Losses that match a layer's marginal to its bridge through a critic (HSIVI-SM, arXiv 2310.17153).

All take the comparison point `y` at noise scale `s'`, sum over pixels and average over the batch. At `t' = t_{k-1}` the
Fisher loss is the paper's HSIVI-SM; at later times it is the diffused one.
"""

from jaxtyping import Float
from torch import Tensor


def critic_loss(
    critic_eps: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], noise_scale: Float[Tensor, "n *ones"]
) -> Float[Tensor, ""]:
    """`mean sum s'^2 (f - zeta/gamma')^2`: the critic learns the student's own noise prediction."""
    return (noise_scale**2 * (critic_eps - target) ** 2).flatten(1).sum(1).mean()


def fisher_loss(
    critic_eps: Float[Tensor, "n *shape"],
    teacher_eps: Float[Tensor, "n *shape"],
    target: Float[Tensor, "n *shape"],
    noise_scale: Float[Tensor, "n *ones"],
) -> Float[Tensor, ""]:
    """`mean sum s'^2 [2 g (zeta/gamma' - eps*) - g^2]`, g = f - eps*: the Fisher divergence, at the best critic.

    The gradient must reach the student through `y` inside `critic_eps` and `teacher_eps` as well.
    """
    gap = critic_eps - teacher_eps
    return (noise_scale**2 * (2 * gap * (target - teacher_eps) - gap**2)).flatten(1).sum(1).mean()


def reverse_kl_surrogate(
    critic_eps: Float[Tensor, "n *shape"],
    teacher_eps: Float[Tensor, "n *shape"],
    y: Float[Tensor, "n *shape"],
    noise_scale: Float[Tensor, "n *ones"],
) -> Float[Tensor, ""]:
    """`mean sum -s' stopgrad(f - eps*) y'`: its gradient is that of the diffused reverse KL, up to a weight `s'^2`.

    Only its gradient means anything; the value does not. Nothing flows through the critic or the teacher.
    """
    gap = (critic_eps - teacher_eps).detach()
    return -(noise_scale * gap * y).flatten(1).sum(1).mean()
