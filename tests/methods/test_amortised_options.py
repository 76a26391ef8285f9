"""What the options of --amortize come to, and which of them contradict one another."""

import pytest
import torch
from conjugate import conjugate_target

from hsivi_cli.errors import InputError
from hsivi_cli.methods.amortised_options import AmortisedOptions, check_amortised, configure, parse_shape

OBSERVED = torch.zeros(4, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"method": "vi"}, "--method"),
        ({"method": "npe", "estimator": "a"}, "--estimator"),
        ({"estimator": "d"}, "--estimator d"),
        ({"encoder": "gan"}, "--encoder gan"),
        ({"embedding": "words"}, "--embedding words"),
        ({"method": "npe", "particles": 10}, "--particles"),
        ({"method": "wake", "simulations": 1000}, "--simulations"),
        ({"method": "msc", "sleep": 0.5}, "--sleep"),
        ({"sleep": 1.0}, "--sleep 1.0"),
        ({"shape": "3by4"}, "--shape 3by4"),
    ],
)
def test_contradictions_are_refused_by_name(fields, names):
    with pytest.raises(InputError, match=names):
        check_amortised(AmortisedOptions(**fields))


def test_simulations_join_where_the_model_has_them():
    with_simulator, without = conjugate_target(OBSERVED), conjugate_target(OBSERVED, simulate=None)
    assert configure(AmortisedOptions(), with_simulator).sleep == 0.5
    assert configure(AmortisedOptions(sleep=0.0), with_simulator).sleep == 0.0
    assert configure(AmortisedOptions(), without).sleep == 0.0
    with pytest.raises(InputError, match="--simulations does nothing"):
        configure(AmortisedOptions(simulations=1000), without)


def test_one_observation_alone_is_refused_where_nothing_else_teaches():
    one = OBSERVED[:1]
    assert configure(AmortisedOptions(), conjugate_target(one)).sleep > 0
    with pytest.raises(InputError, match="one observation alone"):
        configure(AmortisedOptions(), conjugate_target(one, simulate=None))
    with pytest.raises(InputError, match="one observation alone"):
        configure(AmortisedOptions(method="wake"), conjugate_target(one))


def test_options_reach_the_configuration():
    options = AmortisedOptions("smc-wake", "b", "maf", "mlp", "2", 50, 1000, 0.3, 700, 0.02, 9)
    found = configure(options, conjugate_target(OBSERVED))
    assert (found.estimator, found.particles, found.simulations, found.sleep) == ("b", 50, 1000, 0.3)
    assert (found.steps, found.lr, found.seed, found.shape) == (700, 0.02, 9, (2,))
    assert (found.encoder.family, found.encoder.embedding) == ("maf", "mlp")
    assert configure(AmortisedOptions("wake", particles=33), conjugate_target(OBSERVED)).draws == 33


def test_shapes():
    assert [parse_shape(text) for text in ("5", "10x3", "1x8x8")] == [(5,), (10, 3), (1, 8, 8)]
    with pytest.raises(InputError, match="has 2"):
        configure(AmortisedOptions(shape="3x4"), conjugate_target(OBSERVED))
    for text in ("", "0x3", "1x2x3x4", "-1", "3 x 4"):
        with pytest.raises(InputError, match="--shape"):
            parse_shape(text)
