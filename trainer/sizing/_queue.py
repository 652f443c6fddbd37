"""A closed queueing network of three stations, and how long it takes to play a batch through it.

Each episode goes round: engine, driver, environment. The engine works faster the more requests it holds, the driver
(this process) takes one at a time, environments keep nobody waiting for another. For such a network the number of
turns per second with k episodes in it is exact (Gordon and Newell 1967; Buzen's convolution, CACM 16:9, 1973):

    X(k) = G(k - 1) / G(k),   G(k) = sum over i + j + l = k of  prod_{a<=i} 1/mu(a) * d^j * Z^l / l!

with mu(a) turns per second of an engine that holds a requests, d driver seconds and Z environment seconds per turn.

Invariant: X(k) is at most mu's largest value and at most k / (1/mu(1) + d + Z), rises with k and falls with Z.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from palaestra.trainer.sizing._measured import EngineLevel


def engine_rates(levels: Sequence[EngineLevel], most: int) -> NDArray[np.float64]:
    """Tokens per second with 1 to `most` requests, shape (most,), interpolated and flat above the last level.

    Measurement noise is taken out: more requests never give fewer tokens, nor more tokens for each request.
    """
    points = [(levels[0].concurrency, levels[0].tokens_per_s)]
    for before, level in pairwise(levels):
        held = max(level.tokens_per_s, points[-1][1])
        points.append((level.concurrency, min(held, points[-1][1] * level.concurrency / before.concurrency)))
    counts = np.arange(1, most + 1, dtype=np.float64)
    first = points[0]
    rates = np.interp(counts, [count for count, _ in points], [rate for _, rate in points])
    return np.where(counts < first[0], first[1] * counts / first[0], rates)


def throughputs(turns_per_s: NDArray[np.float64], *, driver_s: float, env_s: float) -> NDArray[np.float64]:
    """X(1) to X(K), shape (K,), for an engine that makes `turns_per_s[k - 1]` turns per second with k requests."""
    count = len(turns_per_s)
    engine = np.concatenate([[0.0], -np.cumsum(np.log(turns_per_s))])
    steps = np.arange(count + 1, dtype=np.float64)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(steps[1:]))])
    driver = _powers(driver_s, steps)
    environment = _powers(env_s, steps) - factorials
    constants = _convolve(_convolve(engine, driver), environment)
    flow: NDArray[np.float64] = np.exp(constants[:-1] - constants[1:])
    return flow


def drain_s(work: Sequence[float], slots: int, turns_per_s: NDArray[np.float64]) -> float:
    """Seconds to play a batch to its end, `slots` episodes at a time; `work` are the turns of each.

    With k episodes under way each advances by X(k) / k turns a second, so that the last few drain slowly.
    """
    waiting = iter(work)
    running = sorted(next(waiting) for _ in range(min(slots, len(work))))
    done = seconds = 0.0
    while running:
        count = len(running)
        ends = heapq.heappop(running)
        seconds += (ends - done) * count / float(turns_per_s[count - 1])
        done = ends
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(running, done + following)
    return seconds


def _powers(value: float, exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of value ** exponent; a station that takes no time holds nobody."""
    if value <= 0:
        return np.where(exponents == 0, 0.0, -np.inf)
    logarithms: NDArray[np.float64] = exponents * np.log(value)
    return logarithms


def _convolve(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    # in logarithms: the constants of a thousand episodes leave the range of floats
    sums = [np.logaddexp.reduce(first[: k + 1] + second[k::-1]) for k in range(len(first))]
    return np.array(sums, dtype=np.float64)
