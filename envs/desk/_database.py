"""The database of one episode: SQLite in memory, with the rules that the desk itself enforces.

Invariant: a method either does all of its change or raises `DeskError` and does nothing.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

_SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE) STRICT;
CREATE TABLE tickets (
    id INTEGER PRIMARY KEY,
    customer INTEGER NOT NULL REFERENCES customers,
    subject TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('open', 'closed')),
    priority TEXT NOT NULL,
    team TEXT NOT NULL
) STRICT;
CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer INTEGER NOT NULL REFERENCES customers,
    item TEXT NOT NULL,
    condition TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('paid', 'refunded', 'declined'))
) STRICT;
"""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "customers": ("id", "name"),
    "tickets": ("id", "customer", "subject", "status", "priority", "team"),
    "orders": ("id", "customer", "item", "condition", "status"),
}


class DeskError(Exception):
    """The desk refuses a request; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class DeskDatabase:
    """One episode's records. Belongs to the thread that made it."""

    def __init__(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        self._connection.deserialize(_empty_image())
        self._connection.execute("BEGIN")
        for table, columns in COLUMNS.items():
            marks = ", ".join(f":{column}" for column in columns)
            self._connection.executemany(f"INSERT INTO {table} VALUES ({marks})", tables.get(table, ()))
        self._connection.execute("COMMIT")

    def find_customer(self, name: str) -> dict[str, Any]:
        """The customer of that full name, upper or lower case."""
        rows = self._select("customers", "name = ?", " ".join(name.split()))
        if not rows:
            raise DeskError(404, f"no customer {name}")
        return rows[0]

    def list_of(self, table: str, customer: int) -> list[dict[str, Any]]:
        """A customer's `tickets` or `orders`, by id."""
        if not self._select("customers", "id = ?", customer):
            raise DeskError(404, f"no customer {customer}")
        return self._select(table, "customer = ?", customer)

    def change_ticket(self, ticket: int, column: str, value: str) -> None:
        """Set `priority`, `team` or `status` of an open ticket."""
        row = self._get("tickets", ticket, "ticket")
        if row["status"] == "closed":
            raise DeskError(409, f"ticket {ticket} is closed")
        self._set("tickets", ticket, column, value)

    def settle_order(self, order: int, status: str) -> None:
        """Mark a paid order as `refunded` or `declined`."""
        row = self._get("orders", order, "order")
        if row["status"] != "paid":
            raise DeskError(409, f"order {order} is {row['status']}")
        self._set("orders", order, "status", status)

    def expect(self, table: str, number: int, about: str) -> None:
        """Refuse unless the ticket or order is about `about`; an empty text expects nothing."""
        column, noun = ("subject", "ticket") if table == "tickets" else ("item", "order")
        if about and self._get(table, number, noun)[column] != about.strip().lower():
            raise DeskError(409, f"{noun} {number} is not about {about}")

    def dump(self) -> dict[str, list[dict[str, Any]]]:
        """All rows of all tables, by id."""
        return {table: self._select(table, "1 = ?", 1) for table in COLUMNS}

    def close(self) -> None:
        """Drop everything."""
        self._connection.close()

    def _get(self, table: str, number: int, noun: str) -> dict[str, Any]:
        rows = self._select(table, "id = ?", number)
        if not rows:
            raise DeskError(404, f"no {noun} {number}")
        return rows[0]

    def _set(self, table: str, number: int, column: str, value: str) -> None:
        if column not in COLUMNS[table]:
            raise ValueError(f"no column {column!r} in {table}")
        self._connection.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (value, number))

    def _select(self, table: str, condition: str, value: object) -> list[dict[str, Any]]:
        cursor = self._connection.execute(f"SELECT * FROM {table} WHERE {condition} ORDER BY id", (value,))
        return [dict(zip(COLUMNS[table], row, strict=True)) for row in cursor]


@functools.cache
def _empty_image() -> bytes:
    """A database with the schema and no rows: loading it is several times cheaper than making it."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(_SCHEMA)
        return connection.serialize()
    finally:
        connection.close()
