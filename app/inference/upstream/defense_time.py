"""How long a defense takes for the largest batch, measured at start."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.errors import ConfigError
from scumble.defenses import Defense


def measured(
    defense: Defense,
    answer: Callable[[], object],
    images: int,
    limit_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds that a defense takes, at the second try, as the first may load something.

    Args:
        defense: for the message.
        answer: has it answer the largest batch.
        images: in that batch.
        limit_s: seconds that it may take.
        clock: seconds.

    Raises:
        ConfigError: it takes longer.
    """
    answer()
    start = clock()
    answer()
    seconds = clock() - start
    if seconds > limit_s:
        raise ConfigError(
            f"the defense {defense!r} takes {seconds:.2g} s for {images} images; allowed: "
            f"{limit_s:.2g} s, 1/4 of SCUMBLE_WATCHDOG_S, or a smaller SCUMBLE_BATCH__MAX_SIZE"
        )
    return seconds
