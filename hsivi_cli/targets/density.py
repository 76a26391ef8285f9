"""An unnormalised log density on R^d, the target of every posterior method, and what else a model can tell about it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError

Batch = Float[Tensor, "n d"]
Linearised = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Predictive:
    """What checks of a fit need beyond the density: the response, and how the model would draw another.

    `observed` has shape (N,); `simulate(z, generator)` draws one replicated response for each row of z, shape (n, N);
    `log_likelihood(z)` is pointwise, shape (n, N). `prior(n, generator)` draws z from the prior, shape (n, d), None
    where the prior is improper; `condition(response)` is the same posterior given another response of shape (N,).
    """

    observed: Float[Tensor, " N"]
    simulate: Callable[[Batch, torch.Generator], Float[Tensor, "n N"]]
    log_likelihood: Callable[[Batch], Float[Tensor, "n N"]] | None = None
    prior: Callable[[int, torch.Generator], Batch] | None = None
    condition: Callable[[Float[Tensor, " N"]], "Density"] | None = None


@dataclass(frozen=True)
class Parts:
    """Prior and likelihood apart: `sample_prior(n, generator)` draws (n, d), the others map (n, d) to (n,).

    Their sum is the log density; `log_prior` includes the log Jacobian. Impossible points are -inf in either.
    """

    sample_prior: Callable[[int, torch.Generator], Batch]
    log_prior: Callable[[Batch], Float[Tensor, " n"]]
    log_likelihood: Callable[[Batch], Float[Tensor, " n"]]


def _as_z(z: Batch) -> dict[str, Tensor]:
    return {"z": z}


@dataclass(frozen=True)
class Density:
    """An unnormalised log density on R^`dim`, in float64, batched over rows.

    `log_prob(z)` maps (n, d) to (n,) and includes the log Jacobian of every transform, and all normalisers, so that its
    integral is the evidence. `gradient(z)` maps (n, d) to (n, d) and can itself be differentiated; leave it out to have
    it from autograd. `constrain(z)` names what the user sees: {"beta": (n, 3), "sigma": (n,)}. `facts` are lines to
    print (priors, guesses). `log_z` and `reference` are known truths of named examples: the log evidence, and a
    sampler of exact draws. `linearise(z)`, where given, is the gradient at the rows of an array and the product
    `v -> H v` with the Hessian there, as new arrays (at a single row, for any number of rows v): what the adjoint of a
    Langevin path and Newton's steps are fastest with. Without a
    `proper_prior` (with a flat one) the integral is no evidence. `parts` where the model itself tells prior and
    likelihood apart (`find_parts` has them of a pointwise likelihood, too).
    """

    name: str
    dim: int
    log_prob: Callable[[Batch], Float[Tensor, " n"]]
    constrain: Callable[[Batch], dict[str, Float[Tensor, "n ..."]]] = _as_z
    analytic_gradient: Callable[[Batch], Batch] | None = None
    predictive: Predictive | None = None
    facts: tuple[str, ...] = ()
    log_z: float | None = None
    exact_draws: Callable[[int, torch.Generator], Batch] | None = None
    initial: Float[Tensor, " d"] | None = field(default=None)
    linearise: Callable[[np.ndarray], Linearised] | None = None
    proper_prior: bool = True
    parts: Parts | None = None

    @property
    def responses(self) -> int:
        """How many responses an evaluation looks at, as far as is known: what its cost grows with."""
        return 1 if self.predictive is None else len(self.predictive.observed)

    def gradient(self, z: Batch) -> Batch:
        """Gradient of `log_prob` at each row; differentiable once more where `z` asks for gradients."""
        if self.analytic_gradient is not None:
            return self.analytic_gradient(z)
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_(True)
            return torch.autograd.grad(self.log_prob(point).sum(), point, create_graph=graph)[0]

    def value_and_gradient(self, z: Batch) -> tuple[Float[Tensor, " n"], Batch]:
        """`log_prob` and its gradient at each row, detached; autograd needs one evaluation for both."""
        if self.analytic_gradient is not None:
            with torch.no_grad():
                return self.log_prob(z), self.analytic_gradient(z)
        with torch.enable_grad():
            point = z.detach().requires_grad_(True)
            value = self.log_prob(point)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient


def find_parts(density: Density) -> Parts:
    """Prior and likelihood of a density apart. Raises InputError where it does not tell, or the prior is improper."""
    if density.parts is not None:
        return density.parts
    predictive = density.predictive
    if not density.proper_prior:
        raise InputError(f"{density.name}: draws from the prior are needed, and a flat prior has none: see --prior")
    if predictive is None or predictive.log_likelihood is None or predictive.prior is None:
        missing = "a prior to draw from" if predictive is not None and predictive.log_likelihood else "a likelihood"
        raise InputError(f"{density.name}: this method needs {missing}: in a model, give sample_prior=...")
    pointwise = predictive.log_likelihood

    def log_likelihood(z: Batch) -> Float[Tensor, " n"]:
        return pointwise(z).sum(1)

    # where the likelihood has underflowed the difference is no number, which counts as impossible
    return Parts(predictive.prior, lambda z: density.log_prob(z) - log_likelihood(z), log_likelihood)


def column_names(values: dict[str, Float[Tensor, "n ..."]]) -> list[str]:
    """Stan's names of every scalar, as `beta[1]`, `Sigma[2,1]`, `sigma`, in the order of `flatten_values`."""
    names: list[str] = []
    for name, value in values.items():
        shape = value.shape[1:]
        if not shape:
            names.append(name)
            continue
        # row-major, counted from 1
        for index in torch.cartesian_prod(*(torch.arange(1, size + 1) for size in shape)).reshape(-1, len(shape)):
            names.append(f"{name}[{','.join(str(int(i)) for i in index)}]")
    return names


def flatten_values(values: dict[str, Float[Tensor, "n ..."]]) -> Float[Tensor, "n p"]:
    """All named quantities side by side, one column a scalar, in the order of `column_names`."""
    return torch.cat([value.reshape(len(value), -1) for value in values.values()], 1)
