"""Which kill a life gets: at a moment drawn over the time that a life takes, or at a named point that it can reach."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.audit import Snapshot
from tests.chaos.faults import POINTS
from tests.chaos.plan import Fault, Whom

MOMENT = "moment"
_LONGEST_DELAY_S = 0.03
_SPREAD = ("issue", "end", "finish", "commit")
_OF_RESUMING = ("replaying", "replayed")
_WHOMS: tuple[Whom, ...] = ("driver", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One of both: `after_s` seconds from the start, or at `fault`."""

    whom: Whom
    after_s: float | None = None
    fault: Fault | None = None

    @property
    def name(self) -> str:
        return MOMENT if self.fault is None else self.fault.point


def draw_kill(rng: random.Random, run: Path, snapshot: Snapshot, *, steps: int, life_s: float) -> Kill:
    """Half of all kills come at a moment up to `life_s`, the others at points that the run's state allows."""
    whom = rng.choice(_WHOMS)
    if rng.random() < 0.5:
        return Kill(whom=whom, after_s=rng.uniform(0.0, life_s))
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
