"""SIGKILL at random moments: the run that is resumed each time equals the one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = int(os.environ.get("HSIVI_KILLS", "3"))  # 50 takes minutes


def test_a_run_that_is_killed_again_and_again_equals_the_straight_one(tiny_teacher, tmp_path):
    script = Path(__file__).parent / "kill_again.py"
    path = os.pathsep.join([str(script.parent.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}  # a fork may not have threads
    arguments = [sys.executable, str(script), str(tiny_teacher), str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == KILLS
    assert found["differ"] == []
    assert found["lost"] == 0
    assert (found["skipped"], found["rollbacks"]) == (8, 1)  # two and five, and one of the two again
