"""Losses that match a layer's marginal to its bridge through a critic (HSIVI-SM, arXiv 2310.17153).

All take the comparison point `y'` at noise scale `s'`, sum over pixels and average over the batch. At `t' = t_{k-1}`
the Fisher loss is the paper's HSIVI-SM; at later times it is the diffused one. The sums over pixels are kernels where
Triton runs (kernels.critic_loss and student_loss hold the formulas), which draw the comparison's noise again.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.comparison import ComparisonRows
from hsivi_cli.kernels.critic_loss import critic_sums
from hsivi_cli.kernels.philox import Draw
from hsivi_cli.kernels.student_loss import Loss, student_sums


@dataclass(frozen=True)
class Comparison:
    """A layer's output at the time where it is compared with the teacher.

    `y` the noisy output and `t` its time; `log_gamma`, `rows` and `zeta` what it was made with.
    """

    y: Float[Tensor, " n *shape"]
    t: Int[Tensor, " n"]
    log_gamma: Float[Tensor, "..."]
    rows: ComparisonRows
    zeta: Draw


@dataclass(frozen=True)
class StudentLosses:
    """The loss to descend, and two figures to watch: the Fisher divergence (at the best critic), the critic's gap."""

    loss: Float[Tensor, ""]
    fisher: Float[Tensor, ""]
    gap: Float[Tensor, ""]


def critic_loss(critic_eps: Float[Tensor, " n *shape"], at: Comparison, kernels: Kernels = "auto") -> Float[Tensor, ""]:
    """`mean sum s'^2 (f - zeta/gamma')^2`: the critic learns the student's own noise prediction.

    The gradient reaches the critic alone.
    """
    return critic_sums(critic_eps, at.log_gamma, at.rows, at.zeta, kernels).mean()


def student_losses(
    loss: Loss,
    critic_eps: Float[Tensor, " n *shape"],
    teacher_eps: Float[Tensor, " n *shape"],
    at: Comparison,
    kernels: Kernels = "auto",
) -> StudentLosses:
    """The student's loss, by the name it has in kernels.student_loss.

    `fisher` is `mean sum s'^2 [2 g (zeta/gamma' - eps*) - g^2]`, g = f - eps*: the Fisher divergence, at the best
    critic; the gradient must reach the student through `y` inside `critic_eps` and `teacher_eps` as well. `reverse-kl`
    is `mean sum -s' stopgrad(f - eps*) y'`: its gradient is that of the diffused reverse KL, up to a weight `s'^2`, and
    only its gradient means anything; nothing flows through the critic or the teacher.
    """
    sums = student_sums(loss, critic_eps, teacher_eps, at.y, at.log_gamma, at.rows, at.zeta, kernels)
    return StudentLosses(sums.loss.mean(), sums.fisher.mean(), sums.gap.mean())
