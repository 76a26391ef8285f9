"""`--set`: every field of every method can be written as text and comes back, and nothing else is taken."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.methods.latent_registry import METHODS, LatentOptions, method_config, only
from hsivi_cli.methods.latent_settings import OWN_OPTION, of_method, parse_settings
from hsivi_cli.targets.latent import ModelConfig


@dataclass(frozen=True)
class Toy:
    steps: int = 1
    count: int = 2
    share: float = 0.5
    plain: bool = True
    kind: Literal["a", "b+c"] = "a"
    hidden: tuple[int, ...] = (3,)
    pair: tuple[float, float] = (0.1, 0.2)
    limit: int | None = None


TOYS = {"toy": Toy, "peer": Toy}


def test_values_have_the_types_of_their_fields():
    texts = ["count=3", "share=1e-2", "plain=no", "kind=b+c", "hidden=64, 32", "pair=1,2", "limit=none", "peer.limit=4"]
    found = parse_settings(texts, "toy", TOYS)
    assert Toy(**found["toy"]) == Toy(1, 3, 0.01, False, "b+c", (64, 32), (1.0, 2.0), None)
    assert found["peer"] == {"limit": 4}
    assert type(found["toy"]["share"]) is float


@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_every_method_can_be_set_to_what_it_is(name):
    config = METHODS[name].module.Config()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if field.name in OWN_OPTION:
            with pytest.raises(InputError, match=f"use --{field.name}"):
                parse_settings([f"{field.name}={text}"], name, {name: type(config)})
        else:
            assert parse_settings([f"{field.name}={text}"], name, {name: type(config)})[name] == {field.name: value}
    assert set(typing.get_type_hints(type(config))) >= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("count", "write NAME=VALUE"),
        ("count=", "write NAME=VALUE"),
        ("=3", "write NAME=VALUE"),
        ("count=2.5", "a whole number"),
        ("share=much", "a number"),
        ("share=nan", "finite"),
        ("share=inf", "finite"),
        ("plain=maybe", "true or false"),
        ("kind=c", "choose a, b"),
        ("pair=1", "2 numbers"),
        ("hidden=1,x", "a whole number"),
        ("other=1", 'toy has no "other": it has count, share'),
        ("steps=5", "use --steps"),
        ("nobody.count=5", "nobody is not trained here: it is toy, peer"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(text, says):
    with pytest.raises(InputError, match=says) as raised:
        parse_settings([text], "toy", TOYS)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_field_is_set_once():
    with pytest.raises(InputError, match="set twice"):
        parse_settings(["count=1", "toy.count=2"], "toy", TOYS)


def test_a_peer_changes_only_where_it_is_named():
    texts = ("features=32", "vae.dropout=0.2", "gpvae.kappa=0.1")
    assert of_method(texts, "gpvae", "gpvae") == ("features=32", "gpvae.kappa=0.1")
    assert of_method(texts, "gpvae", "vae") == ("vae.dropout=0.2",)
    options = LatentOptions("gpvae", compare=("vae", "vae-decay"), settings=texts)
    gpvae, vae, decay = (method_config(name, only(options, name), ModelConfig(), False) for name in options.methods)
    assert (gpvae.features, gpvae.kappa) == (32, 0.1)
    assert (vae.features, vae.dropout) == (128, 0.2)
    assert (decay.features, decay.dropout) == (128, 0.0)
