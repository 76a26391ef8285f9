"""Drawing many images with a bar, and with a word about the time where it will be long."""

import time
from typing import TYPE_CHECKING

from hsivi_cli.cli import console
from hsivi_cli.engine import processes

if TYPE_CHECKING:
    import numpy as np

    from hsivi_cli.methods.sampling import Sampler

LONG = 60.0  # seconds from which the story says how long it will take


def draw_all(title: str, sampler: "Sampler", n: int, seed: int, batch_size: int) -> "np.ndarray":
    """Images 0 .. n - 1 of `seed` in one array, uint8 NHWC, in every process. Raises what `draw_images` raises."""
    import numpy as np

    from hsivi_cli.methods.sampling import draw_images

    channels, height, width = sampler.shape
    images = np.empty((n, height, width, channels), np.uint8)
    if sampler.compiles:
        console.story("compiling the network first, about a minute where torch has not done it before")
    start, done = time.monotonic(), 0
    with console.guarded_stdout(), console.progress(title, n) as advance:  # a user's network may print
        for batch in draw_images(sampler, n, seed, batch_size, on_batch=advance):
            images[done : done + len(batch)] = batch
            if done == 0 and sampler.compiles:
                console.story(f"compiled, and drew the first {len(batch)}, in {time.monotonic() - start:.0f} s")
            elif done == 0 and len(batch) < n:
                _announce((time.monotonic() - start) * n / (len(batch) * processes.count()), len(batch))
            done += len(batch)
    return images


def _announce(seconds: float, measured: int) -> None:
    if seconds > LONG:
        minutes = seconds / 60
        length = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
        console.story(f"about {length} in all, going by the first {measured} images")
