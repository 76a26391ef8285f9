"""The contract, for every method: state_dict and load_state_dict are inverse, sampling is reproducible."""

import pytest
import torch

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.methods.ddpm import DDPMConfig
from hsivi_cli.methods.hsivi_sm import DistillConfig
from hsivi_cli.methods.registry import METHODS
from hsivi_cli.methods.training import unet_arguments
from hsivi_cli.targets.score_net import load_score_net

BATCH = torch.arange(2 * 64).reshape(2, 1, 8, 8).to(torch.uint8)


def start(name, tiny_teacher):
    if name == "ddpm":
        unet = unet_arguments((1, 8, 8), (8,), 1, False)
        return METHODS[name].init(None, DDPMConfig(unet, {"num_train_timesteps": 1000}, steps=4, batch=2))
    return METHODS[name].init(load_score_net(tiny_teacher), DistillConfig((0, 100, 800), steps=4, batch=4))


@pytest.mark.parametrize("name", METHODS)
def test_contract(name, tiny_teacher, tmp_path):
    method = METHODS[name]
    state, twin = start(name, tiny_teacher), start(name, tiny_teacher)
    for i in (1, 2):
        metrics = method.step(state, BATCH, generator(0, Stream.TRAIN, i))
        assert all(isinstance(value, float) for value in metrics.values())
    assert state.step == 2
    save_checkpoint(tmp_path / "c", method.state_dict(state))
    method.load_state_dict(twin, load_checkpoint(tmp_path / "c"))
    draws = [method.sample(s, PhiloxStreams(0, range(2))) for s in (state, twin)]
    assert torch.equal(*draws)
    after = [method.step(s, BATCH, generator(0, Stream.TRAIN, 3)) for s in (state, twin)]
    assert after[0] == after[1]
