"""The result file of the benchmark."""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date

from benchmarks._chaos.log import RoundLog

from tests.chaos.draws import MOMENT, TRAINING_MOMENT
from tests.chaos.rounds import SCENARIOS, Round, Scenario

_SHOWN = 20


def page(log: RoundLog, options: argparse.Namespace) -> str:
    """Markdown: what was done, a row for each scenario, what was hit, and what broke a rule."""
    rounds = [played for scenario in SCENARIOS for run in log.of_scenario(scenario.name) for played in run]
    kills = [played for played in rounds if played.was_killed]
    num_vllm = sum(log.num_kills(scenario.name) for scenario in SCENARIOS if scenario.engine == "vllm")
    complaints = log.complaints()
    command = f"python benchmarks/chaos.py --kills {options.kills} --vllm {options.vllm} --seed {options.seed}"
    return "\n".join(
        [
            "# Training runs that are killed at random",
            "",
            f"Made on {date.today()} by `{command} --jobs {options.jobs}` on {os.cpu_count()} cores.",
            f"{len(kills)} times a run was killed with SIGKILL, {num_vllm} times with the vLLM engine, and begun again",
            "until it reached its last step. After each kill the ledger was read by a program of its own.",
            "",
            *_table(log),
            "",
            "Played anew are the episodes that were under way at a kill; one that two kills hit counts twice.",
            "A run with Transformers in sync mode was also compared with one that nobody killed: weights, optimiser,",
            "generator state, metrics other than seconds, gradients' fingerprints and all episodes, to the bit.",
            "",
            "Who was killed: " + _counts(played.whom for played in kills) + " (all: with the workers).",
            "When: " + _counts(played.kill for played in kills) + f" ({MOMENT}: drawn over a whole life,",
            f"{TRAINING_MOMENT}: over the time from its first play on; the others are points of the program).",
            "What the run was at: " + _counts(played.phase for played in kills) + ".",
            "",
            f"Rules broken: {len(complaints)}.",
            *(f"- {line}" for line in complaints[:_SHOWN]),
            "",
        ]
    )


def _table(log: RoundLog) -> list[str]:
    head = "engine and mode|runs|kills|resumes|steps made again|episodes on record|played anew|lost"
    columns = [*head.split("|"), "seconds to resume: median", "90 %", "rules broken"]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return lines + [_row(scenario, log.of_scenario(scenario.name)) for scenario in SCENARIOS]


def _row(scenario: Scenario, runs: Sequence[Sequence[Round]]) -> str:
    rounds = [played for run in runs for played in run]
    resumed_s = [played.ready_s for run in runs for played in run[1:] if played.ready_s is not None]
    cells = [
        scenario.name,
        len(runs),
        sum(played.was_killed for played in rounds),
        sum(len(run) - 1 for run in runs),
        sum(played.num_made_again for played in rounds),
        sum(run[-1].kept for run in runs),
        sum(played.anew for played in rounds),
        sum(played.lost for played in rounds),
        _quantile(resumed_s, 0.5),
        _quantile(resumed_s, 0.9),
        sum(len(played.complaints) for played in rounds),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _quantile(values: Sequence[float], share: float) -> str:
    if not values:
        return "-"
    return f"{sorted(values)[math.ceil(share * len(values)) - 1]:.1f}"


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())
