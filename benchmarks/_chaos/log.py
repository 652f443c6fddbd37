"""The rounds that were played, a JSON line each, so that a benchmark that was stopped goes on."""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.rounds import Round


class RoundLog:
    """Rounds by scenario and number of the run; safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._rounds: dict[str, dict[int, list[Round]]] = defaultdict(lambda: defaultdict(list))
        for line in path.read_text().splitlines() if path.exists() else []:
            values: dict[str, Any] = json.loads(line)
            scenario, number = values.pop("scenario"), values.pop("run")
            self._rounds[scenario][number].append(Round(**{**values, "complaints": tuple(values["complaints"])}))

    def add(self, scenario: str, number: int, played: Round) -> None:
        """Keep a round, on the disk too."""
        line = json.dumps({"scenario": scenario, "run": number, **asdict(played)}) + "\n"
        with self._lock, self._path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._rounds[scenario][number].append(played)
            print(f"{scenario} {number}: {played}", flush=True)

    def of_run(self, scenario: str, number: int) -> list[Round]:
        """The rounds of one run, in order."""
        with self._lock:
            return list(self._rounds[scenario][number])

    def of_scenario(self, scenario: str) -> list[list[Round]]:
        """The rounds of each run of a scenario."""
        with self._lock:
            return [list(rounds) for _, rounds in sorted(self._rounds[scenario].items())]

    def is_over(self, scenario: str, number: int) -> bool:
        """Whether a run reached its end."""
        return any(played.is_over for played in self.of_run(scenario, number))

    def is_open(self, scenario: str, number: int) -> bool:
        """Whether a run was begun and did not reach its end."""
        return bool(self.of_run(scenario, number)) and not self.is_over(scenario, number)

    def num_kills(self, scenario: str) -> int:
        """Rounds whose kill hit."""
        return sum(played.was_killed for rounds in self.of_scenario(scenario) for played in rounds)

    def complaints(self) -> list[str]:
        """All that broke a rule, each with the round it was seen after."""
        with self._lock:
            return [
                f"{scenario}, run {number}, round {k} ({played.kill} of {played.whom}): {line}"
                for scenario, runs in sorted(self._rounds.items())
                for number, rounds in sorted(runs.items())
                for k, played in enumerate(rounds)
                for line in played.complaints
            ]
