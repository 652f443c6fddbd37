"""The ledger: every group accounted for, at every moment and after every restart."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palaestra.errors import LedgerError
from palaestra.trainer import _ledger_store
from palaestra.trainer import ledger as module
from palaestra.trainer.ledger import FORMAT, Ledger, read_meta
from palaestra.types import Episode, Group, Outcome, Task, Trajectory


def make_task(number: int) -> Task:
    return Task(id=f"t/{number}", env_id="t", split="train", seed=number, data={"n": number})


def make_group(number: int, *, version: int = 0) -> Group:
    trajectory = Trajectory(
        ids=np.arange(4, dtype=np.int32),
        loss_mask=np.array([False, False, True, True]),
        logprobs=np.array([0, 0, -0.25, -1.5], np.float32),
        versions=np.array([-1, -1, version, version], np.int32),
        turns=np.array([-1, -1, 0, 0], np.int16),
    )
    task = make_task(number)
    episode = Episode(
        id=f"{number}.0",
        task=task,
        outcome=Outcome.SCORED,
        messages=(),
        turns=(),
        reward=1.0,
        terms=(),
        facts={"success": 1.0},
        trajectory=trajectory,
        failure=None,
        wall_s=0.1,
    )
    return Group(id=str(number), task=task, episodes=(episode,))


async def open_ledger(folder: Path) -> Ledger:
    ledger = await Ledger.open(folder, meta={"seed": 1})
    await ledger.use_config({"learner": {}})
    return ledger


def is_closed(folder: Path) -> bool:
    """Whether this process holds none of the folder's files open."""
    held = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return not any(path.is_relative_to(folder) for path in held)


async def play(ledger: Ledger, number: int, *, version: int = 0) -> None:
    """End the only episode of an issued group, and so the group."""
    await ledger.end(number, 0, make_group(number, version=version).episodes[0])
    await ledger.finish(number)


async def test_groups_move_from_issued_to_trained_or_dropped(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    for number in range(4):
        await ledger.issue(number, make_task(number), 1)
    for number in range(3):
        await play(ledger, number)
    await ledger.train([0, 1], 1, {"reward": 0.5})
    await ledger.drop(2, "stale")
    balance = await ledger.balance()
    await ledger.aclose()
    assert (balance.issued, balance.trained, dict(balance.dropped), balance.in_hand) == (4, 2, {"stale": 1}, 1)


async def test_nothing_is_trained_twice_or_unplayed(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.issue(0, make_task(0), 1)
    with pytest.raises(LedgerError, match="not finished"):
        await ledger.train([0], 1, {})
    await play(ledger, 0)
    await ledger.train([0], 1, {})
    with pytest.raises(LedgerError, match="not finished"):
        await ledger.train([0], 2, {})
    with pytest.raises(LedgerError, match="not in hand"):
        await ledger.drop(0, "stale")
    assert len(await ledger.steps()) == 1, "a refused step leaves no record"
    await ledger.aclose()


async def test_finished_groups_come_back_byte_equal(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.issue(0, make_task(0), 1)
    await play(ledger, 0)
    await ledger.aclose()
    ledger = await open_ledger(tmp_path)
    ((number, group),) = await ledger.finished()
    await ledger.aclose()
    expected = make_group(0).episodes[0].trajectory
    actual = group.episodes[0].trajectory
    assert number == 0
    assert group.task == make_task(0)
    assert actual is not None
    assert expected is not None
    for name in ("ids", "loss_mask", "logprobs", "versions", "turns"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


async def test_a_step_comes_back_with_its_groups_in_the_order_trained(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    for number in range(3):
        await ledger.issue(number, make_task(number), 1)
        await play(ledger, number, version=number)
    await ledger.train([2, 0], 1, {"reward": 0.5}, b"trace")
    step = await ledger.load_step(1)
    with pytest.raises(LedgerError, match="no step 2 on record: the run has steps 1 to 1"):
        await ledger.load_step(2)
    await ledger.aclose()
    assert [number for number, _ in step.groups] == [2, 0]
    assert [group.oldest_version for _, group in step.groups] == [2, 0]
    assert (step.config, step.metrics, step.trace) == ({"learner": {}}, {"reward": 0.5}, b"trace")


async def test_steps_follow_each_other(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.issue(0, make_task(0), 1)
    await play(ledger, 0)
    with pytest.raises(LedgerError, match="step 2 cannot follow step 0"):
        await ledger.train([0], 2, {})
    assert [number for number, _ in await ledger.finished()] == [0], "a refused step takes no group"
    await ledger.aclose()


async def test_episodes_that_ended_are_kept_when_their_group_did_not(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.issue(0, make_task(0), 3)
    episode = make_group(0).episodes[0]
    await ledger.end(0, 1, episode)
    with pytest.raises(LedgerError, match="2 of its episodes run"):
        await ledger.finish(0)
    with pytest.raises(LedgerError, match="ended twice"):
        await ledger.end(0, 1, episode)
    await ledger.aclose()
    ledger = await open_ledger(tmp_path)
    (group,) = await ledger.open_groups()
    balance = await ledger.balance()
    await ledger.aclose()
    assert (group.number, group.size, group.task) == (0, 3, make_task(0))
    assert dict(group.ended) == {1: episode}
    assert (balance.episodes_issued, balance.episodes_ended, balance.in_hand) == (3, 1, 1)


async def test_a_changed_byte_of_an_episode_is_found(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.issue(0, make_task(0), 1)
    await play(ledger, 0)
    await ledger.aclose()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        (blob,) = connection.execute("SELECT trajectory FROM plays").fetchone()
        connection.execute("UPDATE plays SET trajectory = ?", (blob[:-1] + bytes([blob[-1] ^ 1]),))
    connection.close()
    ledger = await open_ledger(tmp_path)
    with pytest.raises(LedgerError, match=r"episode 0\.0 in the ledger is damaged: its checksum differs"):
        await ledger.finished()
    await ledger.aclose()


@pytest.mark.parametrize(
    ("sabotage", "complaint"),
    [
        ("DELETE FROM groups WHERE number = 0", "2 groups issued, but 1 trained"),
        ("DELETE FROM episodes WHERE number = 1", "1 episodes do not fill the groups"),
        ("DELETE FROM plays WHERE number = 0", "2 episodes ended, but there are 1 records"),
        ("DELETE FROM steps", "1 groups are trained, but the steps name another number"),
    ],
)
async def test_a_ledger_that_does_not_add_up_is_refused(tmp_path: Path, sabotage: str, complaint: str) -> None:
    ledger = await open_ledger(tmp_path)
    for number in range(2):
        await ledger.issue(number, make_task(number), 1)
        await play(ledger, number)
    await ledger.train([1], 1, {})
    await ledger.aclose()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute(sabotage)
    connection.close()
    with pytest.raises(LedgerError, match=f"does not add up: {complaint}"):
        await open_ledger(tmp_path)
    assert is_closed(tmp_path)


async def test_another_format_is_refused_by_number(tmp_path: Path) -> None:
    await (await open_ledger(tmp_path)).aclose()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'format'")
    connection.close()
    with pytest.raises(LedgerError, match=f"written in format 1, this version of Palaestra reads format {FORMAT}"):
        await open_ledger(tmp_path)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["issue", "finish", "train", "drop", "reopen"]), max_size=30))
async def test_issued_is_always_trained_plus_dropped_plus_in_hand(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger = await open_ledger(folder)
    step = 0
    try:
        for action in actions:
            number = await ledger.next_number()
            unplayed = [group.number for group in await ledger.open_groups()]
            finished = [n for n, _ in await ledger.finished()]
            if action == "issue":
                await ledger.issue(number, make_task(number), 1)
            elif action == "finish" and unplayed:
                await play(ledger, unplayed[0], version=step)
            elif action == "train" and finished:
                step += 1
                await ledger.train(finished[:2], step, {})
            elif action == "drop" and finished:
                await ledger.drop(finished[-1], "stale")
            elif action == "reopen":
                await ledger.aclose()
                ledger = await open_ledger(folder)
            balance = await ledger.balance()
            assert balance.issued == await ledger.next_number()
    finally:
        await ledger.aclose()


async def test_second_owner_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys, pathlib\n"
        "from palaestra.trainer.ledger import Ledger\n"
        "async def main():\n"
        "    ledger = await Ledger.open(pathlib.Path(sys.argv[1]), meta={'seed': 1})\n"
        "    print('open', flush=True); sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(LedgerError, match=f"process {other.pid}"):
            await open_ledger(tmp_path)
        other.kill()
    ledger = await open_ledger(tmp_path)  # the lock dies with its owner
    await ledger.aclose()


async def test_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(LedgerError, match="damaged"):
        await open_ledger(tmp_path)
    assert is_closed(tmp_path)


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b"])
async def test_a_folder_of_any_name_is_read_and_nothing_appears_beside_it(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    await (await open_ledger(run)).aclose()
    assert read_meta(run)["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


async def test_who_leaves_while_the_ledger_is_checked_waits_for_no_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_checking = threading.Event()

    def check_for_ever(connection: sqlite3.Connection, path: Path) -> None:
        is_checking.set()
        connection.execute("WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n) SELECT MAX(k) FROM n")

    await (await open_ledger(tmp_path)).aclose()
    with monkeypatch.context() as fault:
        fault.setattr(_ledger_store, "_look_over", check_for_ever)
        opening = asyncio.create_task(Ledger.open(tmp_path, meta={}))
        await asyncio.to_thread(is_checking.wait, 60)
        opening.cancel()
        await asyncio.wait((opening,))
    assert opening.cancelled()
    assert is_closed(tmp_path)
    await (await open_ledger(tmp_path)).aclose()


@pytest.mark.parametrize("is_long", [True, False])
async def test_a_check_that_takes_long_is_told_with_the_size_of_what_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    is_told, lines, look_over = threading.Event(), list[str](), _ledger_store._look_over

    def check_long(connection: sqlite3.Connection, path: Path) -> None:
        look_over(connection, path)
        assert is_told.wait(60)

    def tell(line: str) -> None:
        lines.append(line)
        is_told.set()

    await (await open_ledger(tmp_path)).aclose()
    if is_long:
        monkeypatch.setattr(module, "_LONG_S", 0.0)
        monkeypatch.setattr(_ledger_store, "_look_over", check_long)
    ledger = await Ledger.open(tmp_path, meta={}, tell=tell)
    await ledger.aclose()
    assert lines == (["checking the ledger, 0.0 GB"] if is_long else [])


async def test_drops_that_steps_told_of_are_summed_over_all_steps(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    assert (await ledger.last_metrics(), await ledger.drops_told()) == ({}, {})
    for step, dropped in enumerate(({"late": 2, "stale": 1}, {}, {"late": 1}), start=1):
        await ledger.issue(step - 1, make_task(step - 1), 1)
        await play(ledger, step - 1)
        await ledger.train([step - 1], step, {"step": step, "dropped": dropped})
    await ledger.issue(3, make_task(3), 1)
    await play(ledger, 3)
    await ledger.train([3], 4, {"step": 4})
    assert await ledger.drops_told() == {"late": 3, "stale": 1}
    assert await ledger.last_metrics() == {"step": 4}
    await ledger.aclose()
