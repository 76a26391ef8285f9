"""The one loop that runs any method: seeds, EMA, schedules, checkpoints, resume, interruption."""
