"""Reading a run's ledger without leaving a trace: of a run that goes on, that was killed, or on a read-only disk.

Invariants: no file of the run is made, changed or removed, but for the index that a run in use shares with its
readers; an answer is of one moment of the ledger, also when its run goes on while it is read.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from palaestra.errors import FULL, LedgerError
from palaestra.trainer import _ledger_store as store

ValueT = TypeVar("ValueT")
ArgumentsT = ParamSpec("ArgumentsT")

_TRIES = 5
"""A run can be taken up, and left again, while a question is answered; hardly as often."""


class LedgerReader:
    """Answers questions about a ledger. Use as a context manager, one for each command: it keeps what it must copy.

    Raises `LedgerError` where the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._copy: _Copy | None = None

    def __enter__(self) -> LedgerReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._forget_copy()

    def ask(
        self,
        function: Callable[Concatenate[sqlite3.Connection, ArgumentsT], ValueT],
        *args: ArgumentsT.args,
        **kwargs: ArgumentsT.kwargs,
    ) -> ValueT:
        """What `function` finds; it may be called again, when the run went on meanwhile."""
        path = self._path
        if not path.is_file():
            raise LedgerError(f"no ledger at {path}: give the folder of a run")
        for _ in range(_TRIES):
            before = _state_of(path)
            try:
                with closing(self._connect(before)) as connection:
                    _check_format(connection, path)
                    value = function(connection, *args, **kwargs)
            except (sqlite3.Error, LedgerError, LookupError, TypeError, ValueError) as error:
                if _is_of_one_moment(before, _state_of(path)):
                    if isinstance(error, sqlite3.Error | json.JSONDecodeError):
                        raise _refusal(path, error) from error
                    raise
            else:
                if _is_of_one_moment(before, _state_of(path)):
                    return value
        raise LedgerError(f"cannot read {path}: its run is taken up and left again all the time; try again")

    def _connect(self, state: _State) -> sqlite3.Connection:
        if state.is_in_use:
            return _open(self._path, "mode=ro")
        if not state.wal_size:  # SQLite would make both files; without them nobody writes
            return _open(self._path, "mode=ro&immutable=1")
        if self._copy is None or self._copy.state != state:
            self._forget_copy()
            self._copy = self._copied(state)
        return _open(Path(self._copy.place.name) / self._path.name, "mode=ro")

    def _forget_copy(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.place.cleanup()

    def _copied(self, state: _State) -> _Copy:
        """Half a copy of a run: what is pending can be read only where an index can be made for it."""
        place = tempfile.TemporaryDirectory(prefix="palaestra-ledger-")
        try:
            for file in (self._path, _wal_of(self._path)):
                shutil.copyfile(file, Path(place.name) / file.name)
        except OSError as error:
            place.cleanup()
            if error.errno in FULL:
                raise
            raise LedgerError(f"cannot read {self._path}: {error}") from error
        return _Copy(place, state)


class _State(NamedTuple):
    """Whether a ledger is open somewhere (or was left so by a run that was killed), and what changes as it is used."""

    is_in_use: bool
    wal_size: int
    size: int
    changed_ns: int


class _Copy(NamedTuple):
    place: tempfile.TemporaryDirectory[str]
    state: _State


def _state_of(path: Path) -> _State:
    try:
        wal_size = _wal_of(path).stat().st_size
    except FileNotFoundError:  # perhaps at this moment: a run that ends removes it
        wal_size = 0
    found = path.stat()
    return _State(path.with_name(f"{path.name}-shm").exists(), wal_size, found.st_size, found.st_mtime_ns)


def _wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _open(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, isolation_level=None)


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    found = store.meta(connection).get("format")
    if found != store.FORMAT:
        raise LedgerError(
            f"{path} was written in format {found}; this version of Palaestra reads format {store.FORMAT}"
        )


def _is_of_one_moment(before: _State, after: _State) -> bool:
    """Whether what was read in between is: by SQLite's care where the run is in use, else as nobody wrote."""
    return after.is_in_use if before.is_in_use else before == after


def _refusal(path: Path, error: Exception) -> LedgerError:
    if isinstance(error, sqlite3.OperationalError):
        return LedgerError(f"cannot read {path}: {error}")
    return LedgerError(f"cannot read {path}: {error}; the file is damaged: restore it from a copy")
