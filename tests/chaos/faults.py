"""Named points of the program at which a life can be killed, and the phases it is in meanwhile.

Runs in the life itself: functions are wrapped before the run begins. Invariant: without a fault only the journal knows.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from palaestra.trainer import _ledger_store, checkpoints, resume
from palaestra.trainer.fit import Fit
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.sync import WeightSync
from tests.chaos.plan import Fault, Journal, Whom

When = Literal["before", "during", "after"]


@dataclass(frozen=True, slots=True)
class Point:
    """A function, by its owner and name; the kill comes before it begins, while it runs, or after it returned.

    `most` is up to which passing a kill is worth planning.
    """

    owner: Any
    name: str
    when: When
    most: int


POINTS: Mapping[str, Point] = {
    "issue": Point(_ledger_store, "issue", "after", 12),
    "end": Point(_ledger_store, "end", "after", 48),
    "finish": Point(_ledger_store, "finish", "after", 12),
    "drop": Point(_ledger_store, "drop", "after", 1),
    "train": Point(_ledger_store, "train", "after", 4),
    "amend": Point(_ledger_store, "amend", "after", 4),
    "commit": Point(_ledger_store._writing, "__exit__", "before", 80),
    "learning": Point(LocalLearner, "step", "during", 4),
    "learned": Point(LocalLearner, "step", "after", 4),
    "publish": Point(WeightSync, "publish", "before", 4),
    "published": Point(LocalLearner, "publish", "after", 4),
    "saving": Point(LocalLearner, "save", "during", 2),
    "sealing": Point(checkpoints, "sync_folder", "before", 3),
    "loaded": Point(LocalLearner, "load", "after", 1),
    "replaying": Point(resume, "make_again", "during", 2),
    "replayed": Point(resume, "make_again", "after", 2),
    "exporting": Point(LocalLearner, "export", "during", 1),
}

_PHASES: Mapping[str, tuple[Any, str]] = {
    "learning": (LocalLearner, "step"),
    "recording": (_ledger_store, "train"),
    "publishing": (WeightSync, "publish"),
    "saving": (checkpoints.Checkpoints, "save"),
    "resuming": (resume, "make_again"),
    "exporting": (LocalLearner, "export"),
    "playing": (Fit, "train"),
}


def install(fault: Fault | None, journal: Journal) -> None:
    """Wrap what the fault and the journal need."""
    journal.write("phase", "starting")
    phases = _Phases(journal)
    for phase, (owner, name) in _PHASES.items():
        _wrap(owner, name, functools.partial(phases.of, phase))
    if fault is not None:
        point = POINTS[fault.point]
        _wrap(point.owner, point.name, _Trap(fault, point.when).set)


def kill_tree(whom: Whom, pid: int) -> None:
    """SIGKILL for a driver, and first for its workers where they are meant."""
    workers = psutil.Process(pid).children(recursive=True) if whom == "all" else []
    for worker in workers:
        worker.kill()
    os.kill(pid, signal.SIGKILL)


class _Phases:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._phases = ["starting"]

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Tell that a phase began, and at its end that the one around it goes on."""
        self._phases.append(phase)
        self._journal.write("phase", phase)
        yield
        self._phases.pop()
        self._journal.write("back", self._phases[-1])


class _Trap:
    def __init__(self, fault: Fault, when: When) -> None:
        self._fault = fault
        self._when = when
        self._num_passed = 0

    @contextmanager
    def set(self) -> Iterator[None]:
        """Kill this process where it is due."""
        self._num_passed += 1
        is_due = self._num_passed == self._fault.count
        if is_due and self._when == "before":
            self._spring()
        if is_due and self._when == "during":
            threading.Timer(self._fault.delay_s, self._spring).start()
        yield
        if is_due and self._when == "after":
            self._spring()

    def _spring(self) -> None:
        kill_tree(self._fault.whom, os.getpid())


def _wrap(owner: Any, name: str, around: Callable[[], Any]) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around():
            return inner(*args, **kwargs)

    @functools.wraps(inner)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        with around():
            return await inner(*args, **kwargs)

    setattr(owner, name, awaited if inspect.iscoroutinefunction(inner) else wrapped)
