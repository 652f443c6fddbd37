"""What stops `palaestra train`, once and twice, in every phase; and who else may work in its folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.jobs import Ended, Job, check_plays, check_whole, last_step

SIGINT, SIGTERM, SIGHUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
FINISHING = "stopping after this step; once more to leave now"
LEFT = "palaestra: interrupted; the same command goes on from the last checkpoint"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def newest_checkpoint(run: Path) -> int:
    return max((int(path.name[8:]) for path in run.glob("checkpoints/version-????????")), default=0)


def hit(job: Job, gate: str, *numbers: signal.Signals, is_training: bool = True) -> Ended:
    """Hold the run at a gate, signal it there, and let it go on after a single signal."""
    job.paths.gate.write_text(gate)
    job.paths.open.unlink(missing_ok=True)
    with job.start() as running:
        running.until_told(f"gate: {gate}")
        for count, number in enumerate(numbers):
            running.send(number)
            if is_training and count == 0:
                running.until_told(FINISHING)
        if is_training and len(numbers) == 1:
            job.paths.open.touch()
        ended = running.wait()  # which also proves that no process and no folder of weights is left
    assert ended.code == 130, ended.text
    job.paths.gate.unlink()
    return ended


def test_once_finishes_the_step_and_saves_and_twice_leaves_at_once(job: Job) -> None:
    assert hit(job, "step", SIGTERM).lines == [FINISHING]
    assert last_step(job.run) == newest_checkpoint(job.run) == 1
    assert hit(job, "step", SIGINT, SIGINT).lines == [FINISHING, LEFT]
    assert last_step(job.run) == 1, "a step that was not recorded is made anew"
    assert hit(job, "save", SIGINT, SIGTERM).lines == [FINISHING, LEFT]
    assert (last_step(job.run), newest_checkpoint(job.run)) == (2, 1)
    assert list(job.run.glob("checkpoints/*.partial*")) == []
    (job.run / "checkpoints" / "version-00000009.partial.tmp").mkdir()  # as a kill in the middle of a save leaves it
    ended = job.finish()
    assert ended.code == 0, ended.text
    assert ended.lines == ["palaestra: making steps 2 to 2 again from the ledger, on checkpoint version-00000001"]
    assert list(job.run.glob("checkpoints/*.partial*")) == []
    check_whole(job.run, steps=3)
    check_plays(job.run)


def test_before_there_is_a_step_to_finish_once_leaves(job: Job) -> None:
    for gate, number in (("import", SIGTERM), ("publish", SIGINT)):
        assert hit(job, gate, number, is_training=False).lines == [LEFT]
    assert hit(job, "step", SIGHUP).lines == [FINISHING]
    shutil.rmtree(job.run / "checkpoints")
    lines = hit(job, "step", SIGTERM, is_training=False).lines
    assert lines == [
        "palaestra: making steps 1 to 1 again from the ledger, on the model the run began with",
        LEFT,
    ]
    check_whole(job.run, steps=1)


def test_a_second_process_is_told_who_is_there_and_a_dead_ones_lock_is_no_obstacle(job: Job) -> None:
    job.paths.gate.write_text("start")
    (job.run).mkdir()
    (job.run / "lock").write_text("process 4194304 on elsewhere since 2001-01-01 00:00:00 (palaestra train)\n")
    with job.start() as first:
        first.until_told("gate: start")
        job.paths.gate.unlink()
        lines = second(job)
        (line,) = lines
        assert f"{job.run} is in use by process {first.process.pid} on {socket.gethostname()} since" in line
        assert "(palaestra train " in line
        assert line.endswith("wait for it, or choose another run folder")
        first.send(SIGINT)
        assert first.wait().lines == [LEFT]


def second(job: Job) -> Sequence[str]:
    folder = job.folder / "second"
    folder.mkdir()
    other = Job(folder=folder, model=job.model)
    os.symlink(job.run, other.run)
    ended = other.finish()
    assert ended.code == 1
    return [line.replace(str(other.run), str(job.run)) for line in ended.lines]
