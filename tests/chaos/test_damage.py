"""Checkpoints that are cut, changed, headless or half-written: the run says so in one line, and loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.lives import Life, Run
from tests.chaos.plan import Fault
from tests.chaos.rounds import SYNC
from tests.chaos.twins import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]


def newest(run: Run) -> Path:
    return max(run.run.glob("checkpoints/version-????????"))


def cut(run: Run) -> None:
    state = newest(run) / "learner.pt"
    state.write_bytes(state.read_bytes()[:-100])


def change(run: Run) -> None:
    state = newest(run) / "learner.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


def behead(run: Run) -> None:
    (newest(run) / "manifest.json").unlink()


def break_all(run: Run) -> None:
    """Every checkpoint; and beside them lies what a save leaves that was killed half-way."""
    for folder in run.run.glob("checkpoints/version-????????"):
        (folder / "learner.pt").write_bytes(b"")
    half = run.run / "checkpoints" / "version-00000012.partial"
    half.mkdir()
    (half / "learner.pt").write_bytes(b"half of")
    (run.run / "checkpoints" / "version-00000012.partial.tmp").mkdir()


def live(run: Run, steps_until_kill: int | None) -> Life:
    """A life that records so many steps more, if it is to be killed."""
    fault = Fault(point="train", count=steps_until_kill) if steps_until_kill is not None else None
    life = run.live(fault=fault)
    assert life.complaints == ()
    assert life.was_killed == (fault is not None)
    return life


def test_damaged_checkpoints_cost_time_and_no_work(tmp_path: Path, model: Path, unbroken: Run) -> None:
    run = Run(folder=tmp_path, model=model, config=SYNC.config(save_every=2))
    live(run, 5)
    lives = [
        (cut, 3, 4, "learner.pt is not what was written", (3, 5, "checkpoint version-00000002")),
        (change, 2, 6, "learner.pt is not what was written", (6, 8, "checkpoint version-00000005")),
        (behead, 2, 8, "manifest.json is missing", (6, 10, "checkpoint version-00000005")),
    ]
    for damage, steps, version, complaint, (first, last, start) in lives:
        damage(run)
        name = f"checkpoint version-{version:08d}"
        aside = f"version-{version:08d}.damaged-1"
        assert live(run, steps).notes == (
            f"{name} cannot be used ({complaint}); it is kept as {aside}",
            f"making steps {first} to {last} again from the ledger, on {start}",
        )
        assert (run.run / "checkpoints" / aside).is_dir()
    break_all(run)
    *asides, told = live(run, None).notes
    assert len(asides) == 2
    assert told == "making steps 1 to 12 again from the ledger, on the model the run began with"
    assert not list(run.run.glob("checkpoints/*.partial*"))
    assert differences(unbroken.run, run.run) == []
