"""Names fitted to a network: one prefix goes or comes, wrappers vanish, and what does not fit is told."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.fit import check_fit, fit_keys


class Net(nn.Module):
    """A network with a buffer, and a module inside it of its own name."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.out = nn.Linear(3, 2)
        self.register_buffer("betas", torch.ones(5))


STATE = Net().state_dict()
WORDS = st.sampled_from(["module", "network", "model", "net", "denoise_fn", "_orig_mod", "ema_model", "0"])


@given(st.lists(WORDS, max_size=4))
def test_any_prefix_is_stripped_and_any_missing_one_added(words):
    prefix = "".join(word + "." for word in words)
    plain = prefix.replace("_orig_mod.", "")
    fitted = fit_keys({prefix + name: tensor for name, tensor in STATE.items()}, STATE)
    assert fitted.complete
    assert not fitted.unexpected
    assert (fitted.stripped, fitted.added) == (plain, "")
    assert all(fitted.tensors[name] is tensor for name, tensor in STATE.items())
    back = fit_keys(STATE, {plain + name: tensor for name, tensor in STATE.items()})
    assert back.complete
    assert (back.stripped, back.added) == ("", plain)


def test_wrappers_inside_names_are_dropped():
    names = {name.replace("net.0", "net._orig_mod.0._checkpoint_wrapped_module"): t for name, t in STATE.items()}
    assert fit_keys(names, STATE).complete


def test_the_average_wins_where_both_fit():
    both = {"online_model." + n: t for n, t in STATE.items()} | {"ema_model." + n: t + 1 for n, t in STATE.items()}
    fitted = fit_keys(both, STATE)
    assert torch.equal(fitted.tensors["betas"], STATE["betas"] + 1)
    assert len(fitted.unexpected) == len(STATE)


def test_what_does_not_fit_is_told():
    state = {"network." + name: tensor for name, tensor in STATE.items()}
    del state["network.out.bias"]
    state["network.betas"] = torch.ones(6)
    state["network.extra\nline"] = state["step"] = torch.ones(1)
    fitted = fit_keys(state, STATE)
    assert fitted.missing == ("out.bias",)
    assert fitted.misshapen == ("betas is 6, not 5",)
    assert set(fitted.unexpected) == {"network.extra\nline", "step"}
    assert not fitted.complete
    with pytest.raises(InputError) as caught:
        check_fit(fitted, Path("net.pt"), "my_net.py")
    told = str(caught.value)
    assert told.startswith("net.pt does not fit my_net.py: 1 weight (out.bias) missing; 1 weight (betas is 6, not 5)")
    assert "\n" not in told
    assert all("\n" not in note for note in fitted.notes)
    assert "'network.'" in fitted.notes[0]


def test_shapes_may_lie_on_meta_and_nothing_at_all_fits_nothing():
    with torch.device("meta"):
        expected = Net().state_dict()
    assert fit_keys(STATE, expected).complete
    assert fit_keys({}, expected).missing == tuple(expected)
    assert fit_keys(STATE, {}).unexpected == tuple(STATE)
