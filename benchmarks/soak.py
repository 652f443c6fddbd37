"""Take thousands of leases while harnesses, boxes and browsers are killed at random; look at what is left.

    python benchmarks/soak.py [--leases 5000] [--concurrency 32] [--seed 0] [--backend jail --backend docker] [--json]

Four harness processes share the leases. In each, what happens to a lease is drawn: the agent's code answers, leaves
daemons, runs out of time or memory, or kills all it can; the harness forgets it half-way; the host kills the box or
the browser. Every so often a whole harness gets SIGKILL and another one takes its place. Each lease must end as the
rule says: what the agent did is a value, what was done to it is an error of ours. After the last one the reaper
runs, and then nothing may be left: no process, container, mount, cgroup, temporary folder, record or browser context.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # last, so that its folders hide nobody's packages

from benchmarks._soak.harness import WEIGHTS, Harness  # noqa: E402
from benchmarks._soak.plants import KINDS  # noqa: E402
from benchmarks._soak.run import NUM_HARNESSES, Plan, Report, Soak  # noqa: E402

from palaestra.errors import ConfigError  # noqa: E402
from palaestra.sandboxes import check_backend  # noqa: E402
from palaestra.sandboxes.browser import find_chromium  # noqa: E402

_SETTLE_S = 20.0
_PR_SET_CHILD_SUBREAPER = 36


def available() -> list[str]:
    """What this machine can do."""
    names = [name for name in ("jail", "docker") if check_backend(name) is None]
    try:
        find_chromium()
    except ConfigError:
        return names
    return [*names, "browser"]


def page(report: Report, options: argparse.Namespace) -> str:
    """The result file."""
    total = report.leases.total()
    rate = f"{total / report.wall_s:.1f} a second"
    command = f"python benchmarks/soak.py --leases {options.leases} --concurrency {options.concurrency}"
    lines = [
        "# Thousands of leases with kills at random",
        "",
        f"Made on {date.today()} by `{command} --seed {options.seed}` on {os.cpu_count()} cores.",
        f"{total} leases in {report.wall_s:.0f} s ({rate}) from {NUM_HARNESSES} processes;",
        f"{report.num_harness_kills} times one of them was killed with SIGKILL and replaced.",
        "",
        "| sandbox | leases |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in sorted(report.leases.items())),
        "",
        "What happened to those whose harness was not killed meanwhile:",
        "",
        "| sandbox: fate | leases |",
        "| --- | --- |",
        *(f"| {fate} | {count} |" for fate, count in sorted(report.fates.items())),
        "",
        f"Ended against the rule: {len(report.wrong)}.",
        *(f"- {one}" for one in report.wrong[:20]),
        "",
        f"What killed harnesses had left for the reaper: {len(report.reaped)}"
        + (f" ({kinds(report.reaped)})." if report.reaped else "."),
        f"What it could not clear: {len(report.not_reaped)}.",
        *(f"- {one}" for one in report.not_reaped),
        "",
        "Left after it: " + ", ".join(f"{len(found)} {what}" for what, found in report.left.items()) + ".",
        *(f"- {what}: {one}" for what, found in report.left.items() for one in found),
        "",
    ]
    return "\n".join(lines)


def kinds(reaped: list[str]) -> str:
    """How many of each kind were cleared."""
    counts = Counter(one.partition(" ")[0] for one in reaped)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def read_options() -> argparse.Namespace:
    """The command line; ends the program with a line when it asks for what cannot be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leases", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", choices=sorted(WEIGHTS), help="repeatable; all by default")
    parser.add_argument("--json", action="store_true", help="print the report instead of writing the page")
    parser.add_argument("--plant", choices=KINDS, default="", help="let each harness leave one, to see it found")
    parser.add_argument("--settle", type=float, default=_SETTLE_S, help="seconds in which what is left may still go")
    parser.add_argument("--harness", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.backend = options.backend or available()
    if not options.backend:
        sys.exit("nothing that this machine can run: see `palaestra doctor`")
    if options.concurrency < NUM_HARNESSES:
        sys.exit(f"--concurrency must be at least {NUM_HARNESSES}")
    return options


def main() -> None:
    options = read_options()
    if options.harness:
        asyncio.run(Harness(options.seed, options.backend, options.plant).run(options.harness))
        return
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        plan = Plan(
            script=Path(__file__).resolve(),
            leases=options.leases,
            concurrency=options.concurrency,
            seed=options.seed,
            backends=options.backend,
            settle_s=options.settle,
            plant=options.plant,
        )
        report = Soak(plan, Path(folder)).run()
    if options.json:
        print(json.dumps(vars(report)))
    else:
        (HERE / "soak.md").write_text(page(report, options))
    if not report.is_clean:
        sys.exit("some leases ended against the rule or left something")


if __name__ == "__main__":
    main()
