"""A changed suite: no group mixes two rewards in one baseline, and what cannot go on is dropped by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from palaestra.errors import LedgerError
from palaestra.rewards import Efficiency, Success
from palaestra.trainer._take_over import take_over
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.ledger import Balance, Ledger
from tests.trainer.test_ledger import make_group, make_task

KEPT, OTHER = "t/Kept-v0", "t/Other-v0"
REWARD = (Success() + Efficiency(max_turns=8) * 0.1).describe()
DOUBLED = (Success() * 2.0 + Efficiency(max_turns=8) * 0.1).describe()
LONGER = (Success() + Efficiency(max_turns=64) * 0.1).describe()
SUITE: dict[str, Any] = {
    "weights": {KEPT: 1.0, OTHER: 1.0},
    "form": "full",
    "options": {OTHER: {"size": 1}},
    "rewards": {"": REWARD},
}


async def write_groups(ledger: Ledger) -> None:
    """Of each environment a finished group, one that is half played, and one that was not begun, in that order."""
    number = 0
    for env_id in (KEPT, OTHER):
        for num_ended in (2, 1, 0):
            await ledger.issue(number, replace(make_task(number), env_id=env_id), 2)
            for position in range(num_ended):
                await ledger.end(number, position, make_group(number).episodes[0])
            if num_ended == 2:
                await ledger.finish(number)
            number += 1


async def go_on(
    folder: Path, suite: dict[str, Any], *, allow: tuple[str, ...] = ("suite",)
) -> tuple[Balance, set[int]]:
    """The balance after a run of `SUITE` went on with another one, and the groups in hand."""
    ledger = await Ledger.open(folder, meta={"suite": SUITE})
    try:
        if await ledger.next_number() == 0:
            await write_groups(ledger)
        await take_over(ledger, {"suite": suite}, GRPOConfig(), allow=allow, say=ledger.note)
        assert (await ledger.meta())["suite"] == suite
        balance = await ledger.balance()
        in_hand = {group.number for group in await ledger.open_groups()} | {n for n, _ in await ledger.finished()}
        told = [line for _, line in await ledger.events() if "in hand of" in line]
        assert sum(int(line.split()[0]) for line in told) == sum(balance.dropped.values())
        return balance, in_hand
    finally:
        await ledger.aclose()


@pytest.mark.parametrize(
    ("change", "half_played"),
    [
        ({"options": {OTHER: {"size": 2}}}, {4}),
        ({"options": {}}, {4}),
        ({"rewards": {"": DOUBLED}}, {1, 4}),
        ({"rewards": {KEPT: REWARD, OTHER: DOUBLED}}, {4}),
        ({"rewards": {"": LONGER}}, {1, 4}),
        ({"rewards": {}}, {1, 4}),
        ({"form": "compact"}, {1, 4}),
    ],
)
async def test_groups_that_were_half_played_by_other_rules_are_dropped(
    tmp_path: Path, change: dict[str, Any], half_played: set[int]
) -> None:
    balance, in_hand = await go_on(tmp_path, SUITE | change)
    assert balance.dropped == {"suite_changed": len(half_played)}
    assert in_hand == set(range(6)) - half_played, "a whole group has one reward, and one that was not begun too"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"weights": {KEPT: 1.0, OTHER: 3.0}},
        {"weights": {OTHER: 1.0, KEPT: 1.0}},
        {"rewards": {KEPT: REWARD, OTHER: REWARD}},
    ],
)
async def test_groups_whose_rules_are_the_same_stay(tmp_path: Path, change: dict[str, Any]) -> None:
    balance, in_hand = await go_on(tmp_path, SUITE | change)
    assert (balance.dropped, in_hand) == ({}, set(range(6)))


async def test_groups_of_an_environment_that_left_are_dropped_also_those_that_finished(tmp_path: Path) -> None:
    balance, in_hand = await go_on(tmp_path, SUITE | {"weights": {KEPT: 1.0}, "options": {}})
    assert (balance.dropped, in_hand) == ({"env_removed": 3}, {0, 1, 2})
    balance, _ = await go_on(tmp_path, SUITE)
    assert balance.dropped == {"env_removed": 3}, "its return brings nothing back"


async def test_a_change_that_is_refused_drops_nothing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="--allow suite"):
        await go_on(tmp_path, SUITE | {"form": "compact"}, allow=())
    balance, _ = await go_on(tmp_path, SUITE, allow=())
    assert balance.dropped == {}
