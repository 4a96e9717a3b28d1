"""Timing a function fairly: compiled and warm before, several inputs, median and spread after."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, the quartiles around it, and how many samples were taken."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high - self.low) / self.median


def measure(call: Callable[..., Any], inputs: Sequence[tuple], wait: Callable[[Any], Any], *,
            seconds: float = 2.0, samples: int = 9, least: int = 5, warmup: int = 2,
            apart: bool = False) -> Timing:
    """Times call(*inputs[i]), going round the inputs.

    Args:
      call: starts the work; may return before it is done.
      wait: waits for a result. It is waited once per sample, after as many calls as take 50 ms, so
        that what the host does between two calls is hidden as it is in a real program.
      seconds: what all samples together should take, and samples how many at most; `least` are taken
        whatever they take, since quartiles of fewer say nothing.
      apart: wait after every call.
    """
    for i in range(warmup):
        wait(call(*inputs[i % len(inputs)]))
    start = time.perf_counter()
    wait(call(*inputs[0]))
    once = time.perf_counter() - start
    calls = 1 if apart else max(1, min(200, int(0.05 / max(once, 1e-6))))
    count = max(least, min(samples, int(seconds / max(once * calls, 1e-6))))
    found = []
    for sample in range(count):
        start = time.perf_counter()
        for i in range(calls):
            result = call(*inputs[(sample + i) % len(inputs)])
        wait(result)
        found.append((time.perf_counter() - start) / calls)
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return Timing(median, low, high, count)


def interleaved(contenders: dict[str, tuple[Callable[..., Any], Sequence[tuple], Callable]], *,
                rounds: int = 3, seconds: float = 2.0) -> dict[str, Timing]:
    """`measure` of several contenders in turns, so that a slow minute of the machine hits all.

    contenders: name -> (call, inputs, wait). The median over rounds of each one's medians.
    """
    found: dict[str, list[Timing]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, (call, inputs, wait) in contenders.items():
            found[name].append(measure(call, inputs, wait, seconds=seconds / rounds,
                                       least=3, warmup=2 if turn == 0 else 0))
    return {name: Timing(statistics.median(t.median for t in each), min(t.low for t in each),
                         max(t.high for t in each), sum(t.samples for t in each))
            for name, each in found.items()}
