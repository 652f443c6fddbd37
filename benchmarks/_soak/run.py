"""The soak itself: starts, kills and replaces harnesses, then looks at what is left of them.

Invariant: a report comes whatever a harness does; one that hangs or breaks is in it.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palaestra.sandboxes.leases import reap
from tests.sandboxes.leftovers import Leftovers

NUM_HARNESSES = 4
LEASES_PER_KILL = 75
_SILENT_S = 60.0
_GOODBYE_S = 60.0
_POLL_S = 0.1


@dataclass
class Report:
    """What happened and what was left."""

    leases: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_harness_kills: int = 0
    num_finished: int = 0
    reaped: list[str] = field(default_factory=list)
    not_reaped: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Every lease ended by the rule, and nothing is left."""
        return not (self.wrong or self.not_reaped or any(self.left.values()))


@dataclass(frozen=True)
class Plan:
    """What to do."""

    script: Path
    leases: int
    concurrency: int
    seed: int
    backends: list[str]
    settle_s: float
    plant: str = ""


class Soak:
    """Starts, kills and replaces harnesses until enough leases were taken, then looks at what is left."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._selector = selectors.DefaultSelector()
        self._alive: dict[subprocess.Popen[bytes], bytes] = {}
        self._heard_s = time.monotonic()
        self._is_over = False
        self._leftovers = Leftovers(folder)
        self.report = Report()

    def run(self) -> Report:
        """The whole of it; harnesses end with it, whatever happens."""
        began_s = time.monotonic()
        try:
            for _ in range(NUM_HARNESSES):
                self._start()
            self._kill_until(self._plan.leases)
            self._end()
        finally:
            for harness in self._alive:
                harness.kill()
                harness.wait()
        self.report.wall_s = time.monotonic() - began_s
        for one in reap():
            (self.report.not_reaped if one.error else self.report.reaped).append(
                f"{one.what}{': ' + one.error if one.error else ''}"
            )
        deadline_s = time.monotonic() + self._plan.settle_s
        while any((left := self._leftovers.look()).values()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        self.report.left = left
        return self.report

    def _start(self) -> None:
        plan = self._plan
        seed = str(self._random.getrandbits(32))
        names = [word for name in plan.backends for word in ("--backend", name)]
        command = [sys.executable, "-P", str(plan.script), "--harness", str(plan.concurrency // NUM_HARNESSES)]
        command += ["--seed", seed, *names, *(["--plant", plan.plant] if plan.plant else [])]
        harness = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert harness.stdout is not None
        os.set_blocking(harness.stdout.fileno(), False)
        self._selector.register(harness.stdout, selectors.EVENT_READ, harness)
        self._alive[harness] = b""
        self._leftovers.pids.append(harness.pid)

    def _kill_until(self, count: int) -> None:
        next_kill = self._random.expovariate(1 / LEASES_PER_KILL)
        while self.report.leases.total() < count and self._listen(_SILENT_S):
            if self.report.leases.total() > next_kill and self._alive:
                next_kill += self._random.expovariate(1 / LEASES_PER_KILL)
                harness = self._random.choice(list(self._alive))
                harness.kill()
                self.report.num_harness_kills += 1
                while harness in self._alive and self._listen(_SILENT_S):  # until another has taken its place
                    pass

    def _end(self) -> None:
        self._is_over = True
        for harness in self._alive:
            assert harness.stdin is not None
            harness.stdin.close()
        while self._alive and self._listen(_GOODBYE_S):
            pass

    def _listen(self, most_s: float) -> bool:
        """Hear what there is; False, and noted as wrong, when no harness has said anything for so long."""
        for key, _ in self._selector.select(_POLL_S):
            self._read(key.data)
        for harness in [one for one in self._alive if one.poll() is not None]:
            # not the end of its stdout, which a process that it left may keep open
            self._read(harness)
            self._bury(harness)
        if not self._alive:  # each ended, or broke
            return self._is_over
        if time.monotonic() - self._heard_s < most_s:
            return True
        self.report.wrong.append(f"no harness has said anything for {most_s:g} s")
        return False

    def _read(self, harness: subprocess.Popen[bytes]) -> None:
        assert harness.stdout is not None
        while data := harness.stdout.read(1 << 16):
            self._heard_s = time.monotonic()
            *lines, self._alive[harness] = (self._alive[harness] + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))
        if data == b"" and harness.stdout in self._selector.get_map():
            self._selector.unregister(harness.stdout)

    def _bury(self, harness: subprocess.Popen[bytes]) -> None:
        assert harness.stdin is not None
        assert harness.stdout is not None
        if harness.stdout in self._selector.get_map():
            self._selector.unregister(harness.stdout)
        harness.stdout.close()
        del self._alive[harness]
        harness.stdin.close()
        if harness.returncode == -signal.SIGKILL:
            if not self._is_over:
                self._start()
        elif harness.returncode != 0:
            self.report.wrong.append(f"a harness ended with {harness.returncode}")

    def _hear(self, told: dict[str, Any]) -> None:
        report = self.report
        if "lease" in told:
            report.leases[told["lease"]] += 1
        elif "done" in told:
            report.fates[": ".join(told["done"])] += 1
            if told["wrong"]:
                report.wrong.append(f"{told['done'][0]}: {told['wrong']}")
        else:
            report.num_finished += 1
            if told["contexts"]:
                report.wrong.append(f"{told['contexts']} browser contexts were left in a harness")
