"""An update is that of the whole batch, however it is cut: in parts, over processes, and with the loss scaled."""

import pytest
import torch
from several import in_processes

from hsivi_cli.engine import processes
from hsivi_cli.engine.optimisation import apply_update, gradient_scaler, share_of

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def trained(batch, accumulate, steps=4, precision="fp32", scale=2.0**16):
    """Weights, metrics and gradient scale after some Adam steps of a small regression on `batch` of the rows."""
    processes.start("cpu")
    w = torch.nn.Parameter(torch.full((3,), 0.1))
    unused = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.Adam([w, unused], amsgrad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=precision == "fp16")
    share = share_of(batch, accumulate)
    x = X[:batch][share.rows.start : share.rows.stop]
    calls = []

    def loss_of(part):
        calls.append(len(x[part]))
        error = (x[part] * w).sum(1) - 1
        if precision == "fp16":
            error = error.half().float()
        return (error**2).mean(), {"error": error.abs().mean()}

    updates = [apply_update(loss_of, share.parts, optimiser, [w, unused], 0.01, 0.5, scaler) for _ in range(steps)]
    assert all(update.stepped for update in updates)
    return w.tolist(), [(update.norm, update.means) for update in updates], calls, scaler.get_scale()


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for (norm, means), (other_norm, other_means) in zip(one[1], other[1], strict=True):
        assert norm == pytest.approx(other_norm, rel=1e-5)
        assert means == pytest.approx(other_means, rel=1e-5)


@pytest.mark.parametrize(("accumulate", "sizes"), [(2, [3, 4]), (3, [2, 2, 3]), (20, [1] * 7)])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(accumulate, sizes):
    cut = trained(7, accumulate)
    same(cut, trained(7, 1))
    assert cut[2] == sizes * 4


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(2, 7, 1), (3, 7, 2), (3, 2, 1)])
def test_processes_give_the_gradient_of_the_whole(count, batch, accumulate):
    found = in_processes(count, trained, batch, accumulate)
    assert all(each[:2] == found[0][:2] for each in found)  # to the last bit, or they would drift apart
    same(found[0], trained(batch, 1))


def test_an_overflow_is_computed_again_at_a_smaller_scale():
    w, metrics, calls, scale = trained(7, 1, precision="fp16", scale=2.0**30)
    assert scale < 2.0**20
    assert len(calls) > 4
    same((w, metrics), trained(7, 1, precision="fp16", scale=8.0))


def test_what_no_scale_can_mend_is_skipped_and_leaves_the_scale():
    w = torch.nn.Parameter(torch.zeros(2))
    scaler = gradient_scaler("fp16", "cpu")
    optimiser = torch.optim.Adam([w])
    for loss in (lambda part: (w.sqrt().sum(), {}), lambda part: (w.sum() / 0, {})):
        update = apply_update(loss, share_of(1).parts, optimiser, [w], 0.1, 1.0, scaler)
        assert not update.stepped
        assert scaler.get_scale() == 2.0**16
        assert torch.equal(w, torch.zeros(2))
    assert apply_update(lambda part: (w.sum(), {}), share_of(1).parts, optimiser, [w], 0.1, 1.0, scaler).stepped


def test_gradients_whose_norm_alone_overflows_are_skipped_and_not_tried_for_ever():
    w = torch.nn.Parameter(torch.zeros(4))
    scaler = gradient_scaler("fp16", "cpu")
    calls = []

    def loss_of(part):
        calls.append(part)
        return (w * 1e25).sum(), {}

    update = apply_update(loss_of, share_of(1).parts, torch.optim.Adam([w]), [w], 0.1, 1.0, scaler)
    assert not update.stepped
    assert len(calls) < 50
