"""Wall-clock times of contestants in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping

Clock = Callable[..., float]
"""(call, number of calls = 1) to seconds per call."""
LEAST_SECONDS = 0.01
"""What one reading lasts at least: shorter calls are made several times in a row."""


def seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call, over that many in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def calls_per_reading(call: Callable[[], object], clock: Clock = seconds) -> int:
    """Warms up, then says how many calls a reading takes."""
    call()
    once = min(clock(call), clock(call))
    return max(1, math.ceil(LEAST_SECONDS / max(once, 1e-7)))


def rounds(
    calls: Mapping[str, Callable[[], object]], counts: Mapping[str, int], repeats: int, clock: Clock = seconds
) -> Iterator[dict[str, float]]:
    """Seconds per call of everyone, `repeats` times; each round starts with another one.

    Ratios are to be taken within a round: what disturbs one reading for long disturbs its neighbours too. Garbage
    is collected between rounds, not within.
    """
    names = list(calls)
    for number in range(repeats):
        first = number % len(names)
        gc.collect(1)  # what the last round left; a full collection costs more than many a round
        was_on = gc.isenabled()
        gc.disable()
        try:
            found = {name: clock(calls[name], counts[name]) for name in names[first:] + names[:first]}
        finally:
            if was_on:
                gc.enable()
        yield found
