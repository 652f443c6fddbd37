"""Kill training runs a hundred times with SIGKILL, go on with each, and look for lost or doubled work.

    python benchmarks/chaos.py [--kills 100] [--vllm 24] [--seed 0] [--jobs 2] [--state runs/chaos-0]

A run is killed at moments drawn over its life, or at named points of the program; every life is one round, kept in
`rounds.jsonl` of the state folder. The same command goes on after the last whole round, and writes chaos.md at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["PYTHONSAFEPATH"] = "1"
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # last, so that its folders hide nobody's packages

from benchmarks._chaos.log import RoundLog  # noqa: E402
from benchmarks._chaos.page import page  # noqa: E402

from tests.chaos.lives import Run  # noqa: E402
from tests.chaos.rounds import SCENARIOS, SYNC, Scenario, draw_and_play, play_round  # noqa: E402
from tests.chaos.walker import make_walker  # noqa: E402

_KILLS_PER_RUN = 10
_TIMEOUT_S = 600.0
_OF_VLLM = [scenario for scenario in SCENARIOS if scenario.engine == "vllm"]
_OF_TRANSFORMERS = [scenario for scenario in SCENARIOS if scenario.engine != "vllm" and scenario != SYNC]


class Chaos:
    """All rounds of all scenarios."""

    def __init__(self, state: Path, seed: int) -> None:
        self._state = state
        self._seed = seed
        self.log = RoundLog(state / "rounds.jsonl")
        self._measuring = threading.Lock()

    def prepare(self) -> None:
        """The model, and the run that nobody kills, with which the exact ones are compared."""
        model = self._state / "model"
        if not (self._state / "model-is-whole").is_file():
            make_walker(model)
            (self._state / "model-is-whole").touch()
        self._measure(SYNC)

    def play(self, scenario: Scenario, quota: int) -> None:
        """Runs of a scenario, one after the other, until `quota` kills hit; each is played to its end."""
        life_s = self._measure(scenario)
        number = 0
        while self.log.num_kills(scenario.name) < quota or self.log.is_open(scenario.name, number):
            self._play_run(scenario, number, quota, life_s)
            number += 1

    def _play_run(self, scenario: Scenario, number: int, quota: int, life_s: float) -> None:
        run = self._run(scenario, f"{scenario.name} {number}".replace(" ", "-"))
        twin = self._run(SYNC, "unbroken-transformers") if scenario.is_exact else None
        while not self.log.is_over(scenario.name, number):
            rounds = self.log.of_run(scenario.name, number)
            rng = random.Random(f"{self._seed} {scenario.name} {number} {len(rounds)}")
            is_wanted = self.log.num_kills(scenario.name) < quota and len(rounds) < _KILLS_PER_RUN
            played = (
                draw_and_play(run, rng, life_s=life_s, twin=twin) if is_wanted else play_round(run, None, twin=twin)
            )
            self.log.add(scenario.name, number, played)

    def _measure(self, scenario: Scenario) -> float:
        """Seconds of a life that nobody ends, once for each engine."""
        name = f"unbroken {scenario.engine}"
        with self._measuring:
            if not self.log.is_over(name, 0):
                self.log.add(name, 0, play_round(self._run(scenario, name.replace(" ", "-")), None))
        return self.log.of_run(name, 0)[0].wall_s

    def _run(self, scenario: Scenario, name: str) -> Run:
        config = scenario.config()
        return Run(folder=self._state / name, model=self._state / "model", config=config, timeout_s=_TIMEOUT_S)


def quotas(kills: int, vllm: int) -> dict[Scenario, int]:
    """How many kills each scenario gets: half of those without vLLM go to the exact one."""
    exact = (kills - vllm + 1) // 2
    return {SYNC: exact, **_share(_OF_VLLM, vllm), **_share(_OF_TRANSFORMERS, kills - vllm - exact)}


def _share(scenarios: list[Scenario], count: int) -> dict[Scenario, int]:
    return {scenario: len(range(k, count, len(scenarios))) for k, scenario in enumerate(scenarios)}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--vllm", type=int, default=24, help="how many of them with the vLLM engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--state", type=Path, help="where the runs and their results are kept")
    parser.add_argument("--page", type=Path, default=HERE / "chaos.md", help="the result file")
    options = parser.parse_args()
    if not 0 <= options.vllm <= options.kills:
        sys.exit("--vllm is a part of --kills")
    options.state = (options.state or HERE.parent / "runs" / f"chaos-{options.seed}").resolve()
    return options


def main() -> None:
    options = read_options()
    options.state.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(options.state, options.seed)
    chaos.prepare()
    with ThreadPoolExecutor(options.jobs) as pool:
        wanted = quotas(options.kills, options.vllm).items()
        for playing in [pool.submit(chaos.play, scenario, quota) for scenario, quota in wanted]:
            playing.result()
    options.page.write_text(page(chaos.log, options))
    if chaos.log.complaints():
        sys.exit("some rounds broke the rules: see " + str(options.page))


if __name__ == "__main__":
    main()
