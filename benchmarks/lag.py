"""Train with every setting of the loop and tools of 0, 100 and 500 ms, and write `lag.md` and its plots.

    python benchmarks/lag.py [--seeds 0 1] [--updates 30] [--minutes 30] [--runs runs/lag] [--prepare | --only-report]

`sync`, `one-step` and `async` with a lag of 1, 2 and 4 train the same small model on the same tasks. Timings need a
machine that does nothing else: `--minutes` ends the playing (no run is begun that would not fit), and judging the
checkpoints afterwards needs no such machine. What is done is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # last, so that its folders hide nobody's packages

from benchmarks._lag.alone import play_alone  # noqa: E402
from benchmarks._lag.desk import register_desk  # noqa: E402
from benchmarks._lag.figures import load, rate  # noqa: E402
from benchmarks._lag.judge import Judge  # noqa: E402
from benchmarks._lag.page import write_page  # noqa: E402
from benchmarks._lag.plan import ENGINE, Run, all_runs, alone_of, lag_runs  # noqa: E402
from benchmarks._lag.play import SharedEngine, is_done, play  # noqa: E402
from benchmarks._lag.start import check_start, start_policy  # noqa: E402

from palaestra.agents.engines import open_engine  # noqa: E402
from palaestra.errors import PalaestraError, ungrouped  # noqa: E402
from palaestra.resources import Resources  # noqa: E402
from palaestra.trainer.progress import TerminalDisplay  # noqa: E402

_BEFORE_FIRST = -1


class Sweep:
    """All that is measured, in order, on one engine."""

    def __init__(self, options: argparse.Namespace, start: Path, resources: Resources, engine: SharedEngine) -> None:
        self._runs: Path = options.runs
        self._plan = all_runs(options.seeds, options.updates)
        self._alone = [alone_of(run) for run in lag_runs(options.seeds[0], options.updates)]
        self._ends_s = time.monotonic() + 60 * options.minutes
        self._longest_s = 0.0
        self._start = start
        self._resources = resources
        self._engine = engine

    async def run(self) -> None:
        """Play, then judge."""
        judge = Judge(self._start, self._engine, self._resources)
        await judge.judge_start(self._runs / "start")
        check_start(rate(load(self._runs / "start" / "judged.json")["0"]).rate)
        await self._play(self._plan[: len(self._alone)])
        await self._play_alone(judge)
        await self._play(self._plan)
        for run in self._plan:
            if is_done(self._runs / run.name):
                say(f"judging {run.name}")
                await judge.judge(run, self._runs / run.name)

    async def _play(self, runs: list[Run]) -> None:
        for run in self._left(runs):
            await play(run, self._start, self._runs / run.name, self._engine, self._resources)

    async def _play_alone(self, judge: Judge) -> None:
        sync = self._runs / self._plan[0].name
        if is_done(sync) and not all(is_done(self._runs / run.name) for run in self._alone):
            await judge.hold_middle(sync)
            frozen = self._engine.frozen()
            for run in self._left(self._alone):
                await play_alone(run, self._start, self._runs / run.name, frozen, self._resources)

    def _left(self, runs: list[Run]) -> Iterator[Run]:
        """The runs that are still to be played and fit into the time."""
        for run in runs:
            if is_done(self._runs / run.name):
                continue
            began_s = time.monotonic()
            if began_s + self._longest_s > self._ends_s:
                say(f"no time left for {run.name}")
                continue
            say(f"playing {run.name}")
            yield run
            self._longest_s = max(self._longest_s, time.monotonic() - began_s)


def say(line: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


async def measure(options: argparse.Namespace) -> None:
    """Make the start policy, and unless no more is asked for, play and judge."""
    start, note = await start_policy(options.runs / "start", TerminalDisplay())
    say(note)
    if options.prepare:
        return
    with ungrouped():
        async with Resources() as resources:
            log = options.runs / "engine.log"
            engine = await open_engine("vllm", start, ENGINE, log, version=_BEFORE_FIRST)
            try:
                await Sweep(options, start, resources, SharedEngine(engine)).run()
            finally:
                await engine.aclose()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to play")
    parser.add_argument("--runs", type=Path, default=Path("runs/lag"), help="where the runs are kept")
    parser.add_argument("--prepare", action="store_true", help="make the start policy and stop")
    parser.add_argument("--only-report", action="store_true", help="write the page from what is there")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    options.runs = options.runs.resolve()
    register_desk()
    try:
        if not options.only_report:
            asyncio.run(measure(options))
        if not options.prepare:
            write_page(HERE, options)
    except PalaestraError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
