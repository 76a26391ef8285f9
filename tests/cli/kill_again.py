"""Kills a small distillation with SIGKILL at random moments and resumes it, again and again; prints what was found.

    python tests/cli/kill_again.py TEACHER FOLDER KILLS SEED

Run by test_kill.py in a process of its own: imports are made once, and every life of the run is a fork of this process.
In each run some updates are not finite, so that steps are skipped and a burst rolls the run back. After every kill all
that lies in the directory must load; a run that came to its end must equal the one that nobody killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 (before the fork, as all that a life would import)
import torch

from hsivi_cli.cli.app import main
from hsivi_cli.engine.checkpoint import load_checkpoint, pack
from hsivi_cli.engine.loop import LOOP
from hsivi_cli.evaluation import reference
from hsivi_cli.io.metrics_log import read_metrics
from hsivi_cli.io.run_directory import METRICS, checkpoints
from hsivi_cli.methods import distillation, hsivi_sm
from hsivi_cli.methods.describe import describe
from hsivi_cli.methods.student import load_student
from hsivi_cli.targets.score_net import load_score_net

STEPS = 40
OPTIONS = ["--nfe", "2", "--steps", str(STEPS), "--batch", "4", "--critic-steps", "1", "--preview-every", "4"]
OPTIONS += ["--reference", "any", "--fid-images", "2", "--warmup", "2", "--resume"]
LONGEST_LIFE = 16  # steps of the straight run's, from the fork to the kill


def prepare():
    """Make previews cheap, regular checkpoints frequent, and some updates not finite."""
    whole_step, whole_loss, whole_config, now = hsivi_sm.step, hsivi_sm.critic_loss, distillation.LoopConfig, {}

    def step(state, batch, generator):
        now["bad"] = state.step + 1 in (7, 21) or (state.lr_scale == 1 and state.step + 1 >= 27)
        return whole_step(state, batch, generator)

    def fid(images):
        return float(abs(images.astype(float).mean() - 127))

    fid.reference_sha256, fid.extractor_sha256 = "a", "b"
    hsivi_sm.step = step
    hsivi_sm.critic_loss = lambda *parts: whole_loss(*parts) * (float("nan") if now["bad"] else 1.0)
    distillation.LoopConfig = lambda *a, **k: whole_config(*a, **(k | {"checkpoint_every": 10}))
    distillation.PREVIEW_IMAGES = 4
    reference.fid_against = lambda *_: fid


def start(teacher, out, log):
    """A life of the run, in a fork; returns its process."""
    if process := os.fork():
        return process
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os._exit(main(["distill", "--score-net", str(teacher), "--out", str(out), *OPTIONS]))
    finally:
        os._exit(99)


def contents(out):
    """Everything that a run computed, loaded from its directory; raises if a part of it does not load."""
    found = {}
    work = out / "training" / "nfe2"
    for path in checkpoints(work):
        tree = load_checkpoint(path)
        tensors, _ = pack({key: value for key, value in tree.items() if key != LOOP})
        found |= {f"{path.name}{name}": tensor for name, tensor in tensors.items()}
        found[path.name] = tree[LOOP]
    for name in ("nfe2", "nfe2-best"):
        if (out / name).exists():
            student = load_student(out / name)
            found |= {f"{name}/{key}": value for key, value in student.unet.state_dict().items()}
            found |= {f"{name}/log_gamma": student.log_gamma, name: student.description["step"]}
    found["metrics"] = [{k: v for k, v in r.items() if k != "seconds_per_step"} for r in read_metrics(work / METRICS)]
    if (out / "config.json").exists():
        describe(out)
    return found


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def differing(one, other):
    """Names of what differs between two runs."""
    return sorted(k for k in one.keys() | other.keys() if k not in one or k not in other or not same(one[k], other[k]))


def kill_again(teacher, folder, kills, seed):
    prepare()
    draws, log = random.Random(seed), folder / "log"
    load_score_net(teacher)
    began = time.monotonic()
    os.waitpid(start(teacher, folder / "straight", log), 0)
    longest = (time.monotonic() - began) * LONGEST_LIFE / STEPS
    straight, done = contents(folder / "straight"), {"kills": 0, "runs": 0, "differ": [], "lost": 0}
    while done["kills"] < kills or done["runs"] == 0:
        out, published = folder / f"killed{done['runs']}", set()
        while True:
            process = start(teacher, out, log)
            if done["kills"] < kills:
                time.sleep(draws.uniform(0, longest))
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                done["kills"] += 1
            elif os.waitstatus_to_exitcode(status):
                sys.exit(f"exit code {os.waitstatus_to_exitcode(status)}: {log.read_text()[-2000:]}")
            contents(out)
            there = {path.name for path in out.glob("nfe*")}
            done["lost"] += len(published - there)  # a name that was there must never vanish
            published |= there
            if not os.WIFSIGNALED(status):
                break
        done["runs"] += 1
        done["differ"] += differing(contents(out), straight)
    done["skipped"] = straight["metrics"][-1]["skipped"]
    done["rollbacks"] = straight["metrics"][-1]["rollbacks"]
    return done | {"compared": len(straight), "steps": STEPS}


if __name__ == "__main__":
    result = kill_again(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write(json.dumps(result) + "\n")
