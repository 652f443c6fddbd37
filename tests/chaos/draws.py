"""Which kill a life gets: at a moment drawn over the time that it takes, or at a named point that it can reach."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.audit import Snapshot
from tests.chaos.faults import POINTS
from tests.chaos.plan import Fault, Whom

MOMENT, TRAINING_MOMENT = "moment", "training moment"
_MOMENTS, _TRAINING_MOMENTS = 0.15, 0.4
_LONGEST_DELAY_S = 0.03
_SPREAD = ("issue", "end", "finish", "commit")
_OF_RESUMING = ("replaying", "replayed")
_WHOMS: tuple[Whom, ...] = ("driver", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of a life that nobody ends: until it is ready to play, and in all."""

    ready_s: float
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One of both: at `fault`, or `after_s` seconds from the start, or from when it is ready."""

    whom: Whom
    after_s: float | None = None
    is_from_ready: bool = False
    fault: Fault | None = None

    @property
    def name(self) -> str:
        if self.fault is not None:
            return self.fault.point
        return TRAINING_MOMENT if self.is_from_ready else MOMENT


def draw_kill(rng: random.Random, run: Path, snapshot: Snapshot, *, steps: int, pace: Pace) -> Kill:
    """Moments over a whole life or its training, else a point that the run's state allows."""
    whom = rng.choice(_WHOMS)
    share = rng.random()
    if share < _MOMENTS:
        return Kill(whom=whom, after_s=rng.uniform(0.0, pace.wall_s))
    if share < _MOMENTS + _TRAINING_MOMENTS:
        return Kill(whom=whom, after_s=rng.uniform(0.0, pace.wall_s - pace.ready_s), is_from_ready=True)
    saved = max((int(path.name[8:]) for path in run.glob("checkpoints/version-????????")), default=0)
    points = [name for name in POINTS if _can_be_reached(name, saved, snapshot.last_step, steps)]
    point = rng.choice(points)
    most = POINTS[point].most
    if point in _OF_RESUMING:
        most = min(most, snapshot.last_step - saved)
    elif point not in _SPREAD:
        most = min(most, steps - snapshot.last_step)
    count = rng.randint(1, max(1, most))
    fault = Fault(point=point, count=count, whom=whom, delay_s=rng.uniform(0.0, _LONGEST_DELAY_S))
    return Kill(whom=whom, fault=fault)


def _can_be_reached(point: str, saved: int, last_step: int, steps: int) -> bool:
    if point in _OF_RESUMING:
        return last_step > saved
    if point == "loaded":
        return saved > 0
    if point == "exporting":
        return last_step >= steps - 3
    return last_step < steps
