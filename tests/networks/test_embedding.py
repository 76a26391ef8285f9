import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.networks.embedding import SetEmbedding, VectorEmbedding, build_embedding, resolve_kind


@pytest.mark.parametrize(
    ("kind", "shape", "found"),
    [
        ("auto", (3,), 3),
        ("auto", (40,), 8),
        ("mlp", (3,), 8),
        ("auto", (5, 2), 8),
        ("auto", (1, 8, 8), 8),
        ("image", (3, 28, 28), 8),
        ("image", (1, 3, 5), 8),
    ],
)
def test_every_kind_gives_as_many_features_as_it_says(kind, shape, found):
    network, features = build_embedding(kind, shape, 8, (16, 16))
    assert features == found
    assert network(torch.randn(4, *shape)).shape == (4, found)


def test_the_order_of_a_set_does_not_count_but_its_rows_do():
    network = SetEmbedding(3, 8, (16, 16))
    x = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(x[:, order]), network(x), rtol=1e-5, atol=1e-6)
    mixed = x.clone()
    mixed[:, :, 0] = x[:, order, 0]  # another set, with the same columns
    assert not torch.allclose(network(mixed), network(x), atol=1e-4)


def test_a_row_can_be_added_to_a_set():
    network = SetEmbedding(2, 8, (16,))
    assert network(torch.randn(4, 30, 2)).shape == network(torch.randn(4, 1, 2)).shape


def test_vectors_keep_their_linear_part():
    network = VectorEmbedding(5, 4, (16,))
    with torch.no_grad():
        for parameter in network.net.parameters():
            parameter.zero_()
    x = torch.randn(6, 5)
    torch.testing.assert_close(network(x), network.linear(x))


@pytest.mark.parametrize(
    ("kind", "shape", "line"),
    [
        ("set", (3,), "takes observations of shape \\(rows, columns\\), not \\(3,\\)"),
        ("mlp", (3, 2), "\\(entries,\\)"),
        ("image", (8, 8), "channels"),
        ("audio", (3,), "not known: use auto, identity, mlp, set, image"),
        ("auto", (0, 2), "not \\(0, 2\\)"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, shape, line):
    with pytest.raises(InputError, match=line):
        resolve_kind(kind, shape)
