"""Priors of latents in the shape of something: pinwheel, swiss roll, square, petals, each with its exact density.

Recipes of section 2.4 of the DDVI study (Piriyakulkij, Wang & Kuleshov, arXiv 2401.02739), which trained against kernel
density estimates of them. The interface is `latent_priors.LatentPrior`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsivi_cli.targets.twisted_angles import solve_angles

Densities = Callable[[Tensor], tuple[Tensor, Tensor]]

LOG_TWO_PI = math.log(2 * math.pi)
LEAST_EXPONENT = -80.0
"""Nothing beside 1, and not yet a subnormal number, whose exponential takes ten times as long."""


def normal_noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal noise, float64, where the generator lives."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


def as_default(z: Tensor) -> Tensor:
    """Draws in torch's default type."""
    return z.to(torch.get_default_dtype())


class Classed(ABC):
    """Priors that are the equal mixture of their classes."""

    name: str
    dim: int
    classes: int

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, the class at random."""
        k = torch.randint(self.classes, (n,), generator=generator, device=generator.device)
        return self.sample_class(k, generator)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the equal mixture."""
        return self.log_prob_class(z).logsumexp(-1) - math.log(self.classes)

    @abstractmethod
    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each class in k."""

    @abstractmethod
    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of every class, in a last dimension."""


class Pinwheel(Classed):
    """Thin twisted arms: `f = (1 + .15 n1, .005 n2)` turned by `-a(f1)`, `a = 2 pi k / K + .25 exp(f1)` in arm k.

    The density of arm k at z is `N(f1; 1, .15^2) N(f2; 0, .005^2) / |1 + .25 exp(f1) f2|` at the f that z comes from.
    In polar coordinates f = r (cos phi, sin phi), and phi solves `phi - .25 exp(r cos phi) = angle(z) + 2 pi k / K`
    modulo 2 pi. Up to r = 1.7 that has one root. Further out the left side falls on a stretch where |f2| is hundreds of
    deviations; there the density is 0 in float64, and the root is sought on the rising stretch.
    """

    name, dim = "pinwheel", 2
    radius, radial, twist = 1.0, 0.15, 0.25

    def __init__(self, arms: int = 10, width: float = 0.0) -> None:
        self.classes, self.across = arms, max(0.005, width)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each arm."""
        noise = normal_noise(generator, len(k), 2)
        f1, f2 = self.radius + self.radial * noise[:, 0], self.across * noise[:, 1]
        angle = 2 * math.pi * k.to(noise) / self.classes + self.twist * f1.exp()
        return as_default(torch.stack((f1 * angle.cos() + f2 * angle.sin(), f2 * angle.cos() - f1 * angle.sin()), -1))

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each arm."""
        return with_gradient(self._densities, z)

    def _densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of each arm, (..., K), and its gradient, (..., K, 2): du, dv are those of f1, f2 with z."""
        plane = z.double()
        z1, z2 = plane.unsqueeze(-2).unbind(-1)
        turn = 2 * math.pi * torch.arange(self.classes, device=z.device, dtype=torch.float64) / self.classes
        f1 = self._roots(plane.detach(), turn)
        bent = self.twist * f1.exp()
        sine, cosine = (turn + bent).sin(), (turn + bent).cos()
        if torch.is_grad_enabled() and z.requires_grad:
            # the root was found without a graph; one step of Newton from it has the derivative of the root
            slope = _away_from_zero(1 + bent * (z1 * sine + z2 * cosine)).detach()
            f1 = f1 - (f1 - z1 * cosine + z2 * sine) / slope
            bent = self.twist * f1.exp()
            sine, cosine = (turn + bent).sin(), (turn + bent).cos()
        f2 = z1 * sine + z2 * cosine
        slope = 1 + bent * f2
        jacobian = _away_from_zero(slope)
        radial = -0.5 * ((f1 - self.radius) / self.radial).square() - math.log(self.radial)
        across = -0.5 * (f2 / self.across).square() - math.log(self.across)
        value = radial + across - LOG_TWO_PI - jacobian.abs().log()
        # d value = at_u du + at_v dv with dv = (sine, cosine) + bent f1 du, du = (cosine, -sine) / jacobian
        moving = torch.where(slope == jacobian, bent / jacobian, 0.0)
        at_v = -f2 / self.across**2 - moving
        at_u = (self.radius - f1) / self.radial**2 - moving * f2 + at_v * bent * f1
        along = at_u / jacobian
        gradient = torch.stack((along * cosine + at_v * sine, at_v * cosine - along * sine), -1)
        return value.to(z.dtype), gradient.to(z.dtype)

    def _roots(self, z: Tensor, turn: Tensor) -> Tensor:
        """f1 in each arm: (..., 2) to (..., K)."""
        r = z.norm(dim=-1, keepdim=True).clamp(1e-12, 100.0)  # so that exp(r) stays finite, for rows in another world
        return solve_angles(r, torch.atan2(z[..., 1:], z[..., :1]) + turn, self.twist)


class SwissRoll(Classed):
    """`z = r (cos a, sin a) + noise N(0, I)` with `r = 3 sqrt(u)`, `a = 4.5 pi sqrt(u)`, u ~ U(0, 1); class k has

    u in [k / 10, (k + 1) / 10]. Further dimensions are noise. The density is Gauss-Legendre quadrature over sqrt(u), in
    each class with nodes closer than the noise is wide.
    """

    name, classes, own = "swiss-roll", 10, 0.1

    def __init__(self, dim: int = 2, noise: float = own, nodes: int = 0) -> None:
        self.dim, self.noise = dim, noise
        # a class is 2.1 long; the middle nodes of n are pi / 2 times as far apart as the average
        nodes = nodes or math.ceil(2.1 * math.pi / 2 / (0.8 * noise))
        place, weight = np.polynomial.legendre.leggauss(nodes)
        edges = np.sqrt(np.arange(self.classes + 1) / self.classes)
        low, width = edges[:-1, None], np.diff(edges)[:, None]
        root = low + width * (place + 1) / 2
        # du = 2 sqrt(u) d sqrt(u), and the class has density 10 in u
        self._points = self._curve(torch.from_numpy(root.ravel()))
        self._log_weight = torch.from_numpy(np.log(weight / 2 * width * 2 * root * self.classes)).ravel()
        self._nodes = nodes

    def _curve(self, root: Tensor) -> Tensor:
        turn = 4.5 * math.pi * root
        return 3 * root[:, None] * torch.stack((turn.cos(), turn.sin()), -1)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each class."""
        share = torch.rand(len(k), generator=generator, device=generator.device, dtype=torch.float64)
        z = self.noise * normal_noise(generator, len(k), self.dim)
        z[:, :2] += self._curve(((k + share) / self.classes).sqrt())
        return as_default(z)

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each class."""
        return with_gradient(self._densities, z)

    def _densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of each class, (..., 10), and its gradient, (..., 10, d)."""
        curve = self._points.to(z)
        square = (z[..., None, 0] - curve[:, 0]).square_() + (z[..., None, 1] - curve[:, 1]).square_()
        terms = torch.add(self._log_weight.to(z), square, alpha=-0.5 / self.noise**2)
        terms = terms.unflatten(-1, (self.classes, self._nodes))
        most = terms.detach().amax(-1, keepdim=True)
        share = (terms - most).clamp(min=LEAST_EXPONENT).exp()
        total = share.sum(-1, keepdim=True)
        beside = z[..., 2:].square().sum(-1, keepdim=True) / (2 * self.noise**2)
        constant = self.dim * (0.5 * LOG_TWO_PI + math.log(self.noise))
        value = (total.log() + most)[..., 0] - beside - constant
        # towards the mean of the curve's points, each by its share
        along = share.flatten(0, -3).transpose(0, 1) @ curve.unflatten(0, (self.classes, self._nodes))
        centre = along.transpose(0, 1).unflatten(0, z.shape[:-1]) / total
        towards = torch.cat((centre, centre.new_zeros(*centre.shape[:-1], self.dim - 2)), -1)
        return value, (towards - z[..., None, :]) / self.noise**2


class Square:
    """The boundary of [-1, 1]^2, walked clockwise from (-1, 1), with Gaussian noise of sd level / 50 across the side.

    Class k is the stretch u in [k / 10, (k + 1) / 10] of the walk. In more dimensions, the edges of the hypercube, one
    class. Along the side the published recipe is uniform, so that its density is 0 beyond the corners and no posterior
    with a density has a finite ELBO: `along` is a slight Gaussian noise there too, in sampler and density alike.
    """

    name = "square"

    def __init__(self, dim: int = 2, level: float = 3.0, along: float = 0.01, width: float = 0.0) -> None:
        self.dim, self.across, self.along = dim, max(level / 50, width), max(along, width)
        self.classes = 10 if dim == 2 else 1

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws."""
        if self.dim == 2:
            k = torch.randint(self.classes, (n,), generator=generator, device=generator.device)
            return self.sample_class(k, generator)
        shape, device = (n, self.dim), generator.device
        share = torch.rand((2, *shape), generator=generator, device=device, dtype=torch.float64)
        noise = normal_noise(generator, *shape)
        free = share[1].argmax(-1)[:, None] == torch.arange(self.dim, device=device)
        edge = torch.where(share[0] < 0.5, -1.0, 1.0) + self.across * noise
        return as_default(torch.where(free, 2 * share[0] - 1 + self.along * noise, edge))

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each class."""
        if self.classes == 1:
            return self.sample(len(k), generator)
        share = torch.rand(len(k), generator=generator, device=generator.device, dtype=torch.float64)
        walk = 4 * (k + share) / self.classes
        side = walk.floor().clamp_max(3)
        noise = normal_noise(generator, len(k), 2)
        place = 2 * (walk - side) - 1 + self.along * noise[:, 0]
        edge = 1 + self.across * noise[:, 1]
        # top left to right, right downwards, bottom right to left, left upwards
        corners = torch.stack((place, edge, edge, -place, -place, -edge, -edge, place), -1).unflatten(-1, (4, 2))
        return as_default(corners[torch.arange(len(k), device=k.device), side.long()])

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density: a mixture over which coordinate is the free one."""
        edge = torch.logaddexp(self._gauss(z, 1.0), self._gauss(z, -1.0)) - math.log(2)
        free = self._stretch(z, -1.0, 1.0)
        return (edge.sum(-1, keepdim=True) - edge + free).logsumexp(-1) - math.log(self.dim)

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each class: the part on each side that its stretch of the walk touches."""
        if self.classes == 1:
            return self.log_prob(z)[..., None]
        found = []
        for k in range(self.classes):
            begin, end = 4 * k / self.classes, 4 * (k + 1) / self.classes
            parts = []
            for side in range(4):
                low, high = max(begin, side), min(end, side + 1)
                if high - low < 1e-9:
                    continue
                coordinate = 0 if side % 2 == 0 else 1
                place = z[..., coordinate] * (1.0 if side in (0, 3) else -1.0)
                across = self._gauss(z[..., 1 - coordinate], 1.0 if side in (0, 1) else -1.0)
                along = self._stretch(place, 2 * (low - side) - 1, 2 * (high - side) - 1)
                parts.append(along + across + math.log((high - low) / (end - begin)))
            found.append(torch.stack(parts, -1).logsumexp(-1))
        return torch.stack(found, -1)

    def _gauss(self, place: Tensor, mean: float) -> Tensor:
        return -0.5 * ((place - mean) / self.across).square() - 0.5 * LOG_TWO_PI - math.log(self.across)

    def _stretch(self, place: Tensor, low: float, high: float) -> Tensor:
        """Log density of U(low, high) + along N(0, 1)."""
        half = (high - low) / 2
        off = (place - (low + high) / 2).abs()  # symmetric, so that only a lower tail is ever needed
        upper = torch.special.log_ndtr((half - off) / self.along)
        lower = torch.special.log_ndtr((-half - off) / self.along)
        return upper + torch.log1p(-(lower - upper).exp()) - math.log(high - low)


class Petals(Classed):
    """Ten Gaussians on a circle of radius 1.4, with standard deviations .5 outwards and .1 across."""

    name, dim = "mixture", 2
    shift = 1.4

    def __init__(self, petals: int = 10, width: float = 0.0) -> None:
        self.classes = petals
        self.outwards, self.across = math.hypot(0.5, width), math.hypot(0.1, width)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each petal."""
        noise = normal_noise(generator, len(k), 2)
        angle = 2 * math.pi * k.to(noise) / self.classes
        out, side = self.shift + self.outwards * noise[:, 0], self.across * noise[:, 1]
        return as_default(
            torch.stack((out * angle.cos() - side * angle.sin(), out * angle.sin() + side * angle.cos()), -1)
        )

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each petal."""
        angle = 2 * math.pi * torch.arange(self.classes, device=z.device, dtype=z.dtype) / self.classes
        z1, z2 = z[..., :1], z[..., 1:]
        out = (z1 * angle.cos() + z2 * angle.sin() - self.shift) / self.outwards
        side = (z2 * angle.cos() - z1 * angle.sin()) / self.across
        return -0.5 * (out.square() + side.square()) - LOG_TWO_PI - math.log(self.outwards * self.across)


class _WithGradient(torch.autograd.Function):
    """Values whose gradient is known beside them; it is differentiated itself only where that is asked for."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, densities: Densities) -> Tensor:
        value, gradient = densities(z)
        ctx.save_for_backward(z, gradient)
        ctx.densities = densities
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        z, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradient = ctx.densities(z)[1]
        return (upstream[0].unsqueeze(-2) @ gradient).squeeze(-2), None


def with_gradient(densities: Densities, z: Tensor) -> Tensor:
    """`densities(z)[0]`, (..., K), with `densities(z)[1]`, (..., K, d), for its gradient."""
    found: Tensor = _WithGradient.apply(z, densities)
    return found


def _away_from_zero(slope: Tensor, least: float = 1e-3) -> Tensor:
    """The slope, at a fold at least so far from zero."""
    return torch.where(slope.abs() < least, torch.where(slope < 0, -least, least).to(slope), slope)
