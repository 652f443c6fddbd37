"""What one life of a run is to do, and what it tells of itself; both files outlive whoever is killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Whom = Literal["driver", "all"]
"""`driver`: the process that fits, alone. `all`: its workers too, in the same moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """SIGKILL at the `count`-th passing of a named point of the program; `delay_s` later where the point lasts."""

    point: str
    count: int = 1
    whom: Whom = "driver"
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One life: fit `run`, and be killed by `fault` if that is given."""

    run: str
    model: str
    config: Mapping[str, Any]
    journal: str
    suite: Mapping[str, float]
    allow: tuple[str, ...] = ()
    fault: Fault | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Plan:
        values = json.loads(path.read_text())
        fault = Fault(**values["fault"]) if values["fault"] else None
        return Plan(**{**values, "fault": fault, "allow": tuple(values["allow"])})


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a life told: `phase` when one began, `back` to the one around it, `note`, `step` or `end`."""

    what: str
    value: Any
    at_s: float = field(default_factory=time.time)


class Journal:
    """Appends a line at once, so that it is there whatever happens next."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, what: str, value: Any = None) -> None:
        os.write(self._file, (json.dumps(asdict(Entry(what, value))) + "\n").encode())


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries of a journal, in order; none where no life began."""
    if path.exists():
        for line in path.read_text().splitlines():
            yield Entry(**json.loads(line))
