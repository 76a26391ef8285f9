"""A user's own network: `--network my_net.py:build`, whose `build()` returns a torch module called as `net(x, t)`."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import sha256
from hsivi_cli.networks.noise_prediction import PlainNetwork
from hsivi_cli.targets.checkpoints.fit import Fitted, check_fit, fit_keys
from hsivi_cli.targets.checkpoints.read import read_tensors
from hsivi_cli.targets.model_calls import describe
from hsivi_cli.targets.user_model import run_user_file

TRIALS = (2, 1)  # images of the calls that a network is tried with: the last batch of many may be a single one


def build_user_network(network: str, shape: tuple[int, int, int]) -> PlainNetwork:
    """Run `FILE:FUNCTION` (the function is `build` where none is named) and check what it returns.

    `shape` is (channels, height, width). Raises InputError in one line for a file or function that is missing or fails,
    and for a module that does not answer `net(x, t)`, t of shape (n,), with an image a sample.
    """
    file, _, name = network.rpartition(":") if not network.endswith(".py") else (network, "", "build")
    if not file:
        raise InputError(f"--network {network}: give FILE.py:FUNCTION, the file and function that build your network")
    path, name = Path(file), name or "build"
    function = getattr(run_user_file(path, "--network", f"{name}()", double=False), name, None)
    if not callable(function):
        raise InputError(f"--network {network}: {path.name} defines no function {name}: write def {name}(): return net")
    try:
        with torch.random.fork_rng(devices=[]):
            net = function()
    except (Exception, SystemExit) as err:
        raise InputError(f"--network {network}: {name}() raised {describe(err, str(path))}") from err
    if not isinstance(net, nn.Module):
        raise InputError(f"--network {network}: {name}() returned a {type(net).__name__}, not a torch.nn.Module")
    if next(net.parameters(), None) is None:
        raise InputError(f"--network {network}: {name}() returned a module without parameters: nothing could be loaded")
    # by its last name alone: where the file lies is nobody's business, and no other network
    return PlainNetwork(net, shape, f"{path.name}:{name}", sha256(path))


def load_user_network(path: Path, network: str, shape: tuple[int, int, int]) -> tuple[PlainNetwork, tuple[str, ...]]:
    """The user's network with the weights of the file `path`, and notes on what was run and how the names were fitted.

    Raises InputError, in one line, as `build_user_network`, `read_tensors` and `try_network` do.
    """
    tensors = read_tensors(path)  # before anything of the user's is run
    built = build_user_network(network, shape)
    fitted = _fit(tensors.tensors, built.net.state_dict())
    check_fit(fitted, path, f"--network {network}")
    if not fitted.tensors:  # of a module that keeps its parameters out of its state dict
        raise InputError(f"{path} does not fit --network {network}: none of its weights has a place there")
    built.net.load_state_dict(fitted.tensors)
    try_network(built.eval(), network)
    return built, (f"ran {network}, as --network says", *tensors.notes, *fitted.notes)


def _fit(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> Fitted:
    """`fit_keys`, also where the user's module wraps the network in others, which stand before all of its names."""
    best, wrapper = fit_keys(tensors, expected), ""
    for parts in zip(*(name.split(".")[:-1] for name in expected), strict=False):
        if len(set(parts)) > 1:
            break
        wrapper += f"{parts[0]}."
        inside = {name.removeprefix(wrapper): tensor for name, tensor in expected.items()}
        fitted = fit_keys(tensors, inside)
        if len(fitted.tensors) > len(best.tensors):
            renamed = {wrapper + name: tensor for name, tensor in fitted.tensors.items()}
            best = replace(fitted, tensors=renamed, added=wrapper)
    return best


def try_network(network: PlainNetwork, network_name: str) -> None:
    """Calls of `net(x, t)` with several images and with one.

    Raises InputError in one line if one fails, answers with another shape, or changes x.
    """
    for n in TRIALS:
        _try(network, network_name, n)


def check_trainable(network: PlainNetwork) -> None:
    """Raise InputError in one line unless a copy of the network has a gradient in its parameters."""
    flag = f"--network {network.config['network']}"
    x, t = _trial(network, TRIALS[0])
    try:
        student = copy.deepcopy(network).requires_grad_(True)
        with torch.enable_grad():
            out = student(x, t)
            out = getattr(out, "sample", out)
            found = out.requires_grad
            if found:
                torch.autograd.grad(out.float().square().sum(), list(student.parameters()), allow_unused=True)
    except Exception as err:
        raise InputError(f"{flag}: the network cannot be trained: copy or gradient raised {describe(err)}") from err
    if not found:
        raise InputError(
            f"{flag}: the output does not depend on the parameters through autograd, so nothing can be distilled: "
            "take no_grad(), detach() and the like out of forward"
        )


def _trial(network: PlainNetwork, n: int) -> tuple[Tensor, Tensor]:
    """Noise of n images at t = 0, where the network is."""
    device = next(network.parameters()).device
    x = torch.randn(n, *network.shape, generator=torch.Generator().manual_seed(0))
    return x.to(device), torch.zeros(n, dtype=torch.int64, device=device)


def _try(network: PlainNetwork, network_name: str, n: int) -> None:
    channels, height, width = network.shape
    x, t = _trial(network, n)
    before = x.clone()
    any_number = "" if n == TRIALS[0] else f" (with {TRIALS[0]} images it did not: it must take any number)"
    try:
        with torch.no_grad():
            out = network(x, t)
    except Exception as err:
        what = f"x of shape {tuple(x.shape)}, t of shape {tuple(t.shape)}"
        raise InputError(f"--network {network_name}: net(x, t) with {what} raised {describe(err)}{any_number}") from err
    out = getattr(out, "sample", out)
    fits = isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[1] in (channels, 2 * channels)
    if not fits or (len(out), *out.shape[2:]) != (n, height, width):
        found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        why = "is --shape right?" if isinstance(out, torch.Tensor) else "write a wrapper that returns the tensor"
        if any_number:
            why = "it must take any number of images"
        raise InputError(f"--network {network_name}: net(x, t) gave {found} for x of shape {tuple(x.shape)}: {why}")
    if not bool(out.isfinite().all()):
        raise InputError(f"--network {network_name}: net(x, t) gives NaN or infinity for noise at t = 0: it is broken")
    if not torch.equal(x, before):
        why = "which is still needed: write x = x + 1 and the like, not x += 1"
        raise InputError(f"--network {network_name}: net(x, t) changes x in place, {why}")
