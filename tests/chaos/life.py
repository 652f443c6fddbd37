"""One life of a run, as a program: fits what its plan says until it is done or killed."""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last, so that its folders hide nobody's packages

import palaestra as pl
from tests.chaos import errand  # noqa: F401  # registers the environments
from tests.chaos.faults import install
from tests.chaos.plan import Journal, Plan

_PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no life goes on where its killer died
    plan = Plan.read(Path(sys.argv[1]))
    journal = Journal(Path(plan.journal))
    install(plan.fault, journal)
    trainer = pl.Trainer(
        plan.model,
        pl.GRPOConfig.parse(dict(plan.config)),
        run=plan.run,
        on_step=lambda record: journal.write("step", record.step),
        on_note=lambda line: journal.write("note", line),
        allow=plan.allow,
    )
    journal.write("end", trainer.fit(pl.EnvSuite(dict(plan.suite))).version)


if __name__ == "__main__":
    main()
