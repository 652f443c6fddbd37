"""Checkpoints that are cut, changed, headless or half-written: the run says so in one line, and loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.draws import Kill
from tests.chaos.lives import Life, Run
from tests.chaos.plan import Fault
from tests.chaos.rounds import SYNC
from tests.chaos.twins import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]


def cut(checkpoint: Path) -> None:
    state = checkpoint / "learner.pt"
    state.write_bytes(state.read_bytes()[:-100])


def change(checkpoint: Path) -> None:
    state = checkpoint / "learner.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


def behead(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def leave_half(checkpoint: Path) -> None:
    """What a kill leaves that hits a save half-way."""
    checkpoint.with_suffix(".partial").mkdir()
    (checkpoint.with_suffix(".partial") / "learner.pt").write_bytes(b"half of")
    checkpoint.with_suffix(".partial.tmp").mkdir()


def live(run: Run, steps_until_kill: int | None) -> Life:
    """A life that records so many steps more, if it is to be killed."""
    fault = Fault(point="train", count=steps_until_kill) if steps_until_kill is not None else None
    life = run.live(Kill(whom="driver", fault=fault) if fault is not None else None)
    assert life.complaints == ()
    assert life.was_killed == (fault is not None)
    return life


def test_damaged_checkpoints_cost_time_and_no_work(tmp_path: Path, model: Path, unbroken: Run) -> None:
    run = Run(folder=tmp_path, model=model, config=SYNC.config(save_every=2))
    checkpoints = run.run / "checkpoints"
    live(run, 5)
    cut(checkpoints / "version-00000004")
    assert live(run, 3).notes == (
        complaint(4, "learner.pt is not what was written"),
        "making steps 3 to 5 again from the ledger, on checkpoint version-00000002",
    )
    change(checkpoints / "version-00000006")
    behead(checkpoints / "version-00000005")
    leave_half(checkpoints / "version-00000008")
    assert live(run, None).notes == (
        complaint(6, "learner.pt is not what was written"),
        complaint(5, "manifest.json is missing"),
        "making steps 1 to 8 again from the ledger, on the model the run began with",
    )
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {
        *(f"version-{version:08d}.damaged-1" for version in (4, 5, 6)),
        *(f"version-{version:08d}" for version in (12, 14)),
    }
    assert differences(unbroken.run, run.run) == []


def complaint(version: int, reason: str) -> str:
    name = f"version-{version:08d}"
    return f"checkpoint {name} cannot be used ({reason}); it is kept as {name}.damaged-1"
