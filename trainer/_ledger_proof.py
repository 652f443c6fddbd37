"""The proof of a ledger: every group, episode and step is counted, and what does not add up is refused by name."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palaestra.errors import LedgerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Counts of groups and episodes. `issued = trained + dropped + in_hand` or the ledger is refused.

    `episodes_verified` are those with a reward.
    """

    issued: int
    trained: int
    dropped: Mapping[str, int]
    in_hand: int
    episodes_issued: int
    episodes_ended: int
    episodes_verified: int
    steps: int


def prove(connection: sqlite3.Connection) -> Balance:
    """Count everything; raises `LedgerError` when it does not add up."""
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for state, reason, count in connection.execute(
        "SELECT state, reason, COUNT(*) FROM groups GROUP BY state, reason"
    ).fetchall():
        counts[state] = counts.get(state, 0) + count
        if state == "dropped":
            dropped[reason] = count
    one = _counter(connection)
    balance = Balance(
        issued=one("SELECT COALESCE(MAX(number) + 1, 0) FROM groups"),
        trained=counts.get("trained", 0),
        dropped=dropped,
        in_hand=counts.get("issued", 0) + counts.get("finished", 0),
        episodes_issued=one("SELECT COUNT(*) FROM episodes"),
        episodes_ended=one("SELECT COUNT(*) FROM episodes WHERE outcome IS NOT NULL"),
        episodes_verified=one("SELECT COUNT(*) FROM episodes WHERE outcome IN ('scored', 'truncated')"),
        steps=one("SELECT COALESCE(MAX(step), 0) FROM steps"),
    )
    complaint = _complaint(connection, balance)
    if complaint is not None:
        raise LedgerError(f"the ledger does not add up: {complaint}; restore it, or begin a new run folder")
    return balance


def _complaint(connection: sqlite3.Connection, balance: Balance) -> str | None:
    one = _counter(connection)
    if balance.issued != balance.trained + sum(balance.dropped.values()) + balance.in_hand:
        return (
            f"{balance.issued} groups issued, but {balance.trained} trained, {dict(balance.dropped)} dropped and "
            f"{balance.in_hand} in hand"
        )
    if balance.episodes_issued != one("SELECT COALESCE(SUM(size), 0) FROM groups"):
        return f"{balance.episodes_issued} episodes do not fill the groups that were issued"
    if balance.episodes_ended != one("SELECT COUNT(*) FROM plays"):
        return f"{balance.episodes_ended} episodes ended, but there are {one('SELECT COUNT(*) FROM plays')} records"
    unended = one(
        "SELECT COUNT(*) FROM episodes JOIN groups USING (number) "
        "WHERE outcome IS NULL AND state IN ('finished', 'trained')"
    )
    if unended:
        return f"{unended} episodes never ended, but their groups are finished or trained"
    if balance.steps != one("SELECT COUNT(*) FROM steps"):
        return f"{one('SELECT COUNT(*) FROM steps')} steps are on record, the last is number {balance.steps}"
    if balance.trained != one("SELECT COALESCE(SUM(json_array_length(groups)), 0) FROM steps"):
        return f"{balance.trained} groups are trained, but the steps name another number of them"
    return None


def _counter(connection: sqlite3.Connection) -> Any:
    return lambda query: int(connection.execute(query).fetchone()[0])
