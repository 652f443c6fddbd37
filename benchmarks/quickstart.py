"""Run the main job for several seeds and write `quickstart.md`: tables, curves, and where the time went.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--runs runs/bench] [--only-report]

The goals it checks are the README's: held-out success of the suite at least 20 points over the SFT model, each family
at least 10, disjoint 95 % intervals for the suite, and at most twelve minutes, in every seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SUITE_GAIN, FAMILY_GAIN, MAX_MINUTES, MIN_EPISODES = 0.20, 0.10, 12.0, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="where the run folders go")
    parser.add_argument("--only-report", action="store_true", help="write the page from runs that are there")
    options = parser.parse_args()
    runs = {seed: options.runs / f"seed{seed}" for seed in options.seeds}
    if not options.only_report:
        for seed, run in runs.items():
            play(seed, run)
    loaded = {seed: load(run) for seed, run in runs.items()}
    draw(loaded, HERE / "quickstart.png")
    (HERE / "quickstart.md").write_text(page(loaded))
    if any(problems(value) for value in loaded.values()):
        sys.exit("some goals were missed; see benchmarks/quickstart.md")


def play(seed: int, run: Path) -> None:
    """One whole job from an empty folder; its wall clock is kept beside it."""
    if (run / "report.json").exists():
        sys.exit(f"{run} is done already: remove it, or give --only-report")
    started_s = time.monotonic()
    palaestra = Path(sys.executable).with_name("palaestra")
    subprocess.run([palaestra, "quickstart", "--seed", str(seed), "--run", run], check=True)
    (run / "wall_s").write_text(f"{time.monotonic() - started_s:.1f}\n")


def load(run: Path) -> dict[str, Any]:
    """What a run's own records say."""
    report = json.loads((run / "report.json").read_text())
    steps = json.loads((run / "steps.json").read_text())
    by_name = {value["policy"]: value for value in report["evaluations"]}
    return {**report, "by_name": by_name, "steps": steps, "wall_s": float((run / "wall_s").read_text())}


def problems(value: dict[str, Any]) -> list[str]:
    """The goals that a run missed."""
    sft, rl = value["by_name"]["SFT"], value["by_name"]["RL"]
    found = []
    if rl["success"]["rate"] - sft["success"]["rate"] < SUITE_GAIN:
        found.append("the suite gained less than 20 points")
    if rl["success"]["low"] <= sft["success"]["high"]:
        found.append("the suite's intervals overlap")
    found += [
        f"{env_id} gained less than 10 points"
        for env_id, before in sft["by_env"].items()
        if rl["by_env"][env_id]["rate"] - before["rate"] < FAMILY_GAIN
    ]
    found += [
        f"only {report['success']['count']} episodes of {name} were answered"
        for name, report in value["by_name"].items()
        if report["success"]["count"] < MIN_EPISODES
    ]
    if value["wall_s"] > MAX_MINUTES * 60:
        found.append(f"it took {value['wall_s'] / 60:.1f} minutes")
    return found


def draw(loaded: dict[int, dict[str, Any]], path: Path) -> None:
    """Success in training rollouts by update, one line a seed."""
    figure, axes = plt.subplots(figsize=(8, 4), dpi=110)
    for seed, value in loaded.items():
        steps = value["steps"]
        axes.plot([s["step"] for s in steps], [s["success"] for s in steps], marker=".", label=f"seed {seed}")
    axes.set_xlabel("policy update")
    axes.set_ylabel("success of training rollouts")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def page(loaded: dict[int, dict[str, Any]]) -> str:
    """The whole page as Markdown."""
    seeds = " ".join(map(str, loaded))
    lines = [
        "# The main job, measured",
        "",
        f"Made on {date.today()} by `python benchmarks/quickstart.py --seeds {seeds}`, one run after the other on "
        f"{next(iter(loaded.values()))['facts']['machine']}.",
        "Success is the environment's own check on held-out tasks; brackets are 95 % Wilson intervals. SFT and RL",
        "policies are sampled at temperature 1. The SFT model imitates experts that slip on purpose, so the gain says",
        "that the trainer works, not that the tasks are hard.",
    ]
    for seed, value in loaded.items():
        lines += ["", f"## Seed {seed}", "", *success_table(value), "", *stage_table(value), "", loop_line(value)]
        missed = problems(value)
        minutes = value["wall_s"] / 60
        verdict = "every goal met" if not missed else "MISSED: " + "; ".join(missed)
        lines += ["", f"Wall clock {minutes:.1f} minutes; {verdict}."]
    lines += ["", "![success of training rollouts by policy update](quickstart.png)", ""]
    return "\n".join(lines)


def success_table(value: dict[str, Any]) -> list[str]:
    """Policies by environments."""
    env_ids = sorted(value["by_name"]["SFT"]["by_env"])
    lines = ["| policy | suite | " + " | ".join(env_ids) + " |", "| --- |" + " --- |" * (len(env_ids) + 1)]
    for name, report in value["by_name"].items():
        cells = [report["success"], *(report["by_env"][env_id] for env_id in env_ids)]
        lines.append(f"| {name} | " + " | ".join(map(percent, cells)) + " |")
    return lines


def percent(cell: dict[str, Any]) -> str:
    return f"{cell['rate']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}] of {cell['count']}"


def stage_table(value: dict[str, Any]) -> list[str]:
    """Stages with their seconds; those that overlap count twice."""
    rows = [f"| {s['name']} | {s['seconds']:.0f} | {s['note']} |" for s in value["stages"]]
    return ["| stage | seconds | what happened |", "| --- | --- | --- |", *rows]


def loop_line(value: dict[str, Any]) -> str:
    """The training loop's wall-time split in a sentence."""
    times = value["loop_times"]
    idle = max(0.0, 1.0 - times["use_engine"]) * times["wall_s"]
    return (
        f"Training loop {times['wall_s']:.0f} s: {times['wait_s']:.0f} s waiting for rollouts, "
        f"{times['learn_s']:.0f} s learning, {times['sync_s']:.1f} s weight sync. "
        f"Meanwhile the engine computed {times['use_engine']:.0%} of the time (idle {idle:.0f} s), "
        f"the learner {times['use_learner']:.0%}, and {times['use_envs']:.0%} of the episode slots were inside "
        "an environment."
    )


if __name__ == "__main__":
    main()
