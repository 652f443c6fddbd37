"""What is put around every back end: refusal, queue, leases; on back ends made up for it, which start nothing."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from palaestra.errors import SandboxError
from palaestra.sandboxes import (
    Admission,
    Ended,
    ExecResult,
    Sandbox,
    SandboxSpec,
    Snapshot,
    _backends,
    check_backend,
    fork,
    register_backend,
)
from palaestra.sandboxes._managed import ManagedBackend
from palaestra.sandboxes._records import list_leases


class PretendBox:
    """Answers what it is told to, or fails."""

    def __init__(self, run: Exception | None = None, close: Exception | None = None) -> None:
        self.id = f"pretend-{os.urandom(4).hex()}"
        self._run = run
        self._close = close

    async def run_python(self, *_: object, **__: object) -> ExecResult:
        if self._run is not None:
            raise self._run
        return ExecResult(
            ended=Ended.EXIT,
            exit_code=0,
            signal=None,
            stdout=b"42\n",
            stderr=b"",
            stdout_total=3,
            stderr_total=0,
            wall_s=0.0,
        )

    async def snapshot(self) -> Snapshot:
        return Snapshot(b"")

    async def restore(self, _: Snapshot) -> None:
        pass

    async def aclose(self) -> None:
        if self._close is not None:
            raise self._close


class PretendBackend:
    """Makes such boxes, or fails."""

    name = "pretend"

    def __init__(self, create: Exception | None = None, **box: Exception) -> None:
        self._create = create
        self._box = box

    async def create(self, _: SandboxSpec) -> Any:
        if self._create is not None:
            raise self._create
        return PretendBox(**self._box)

    async def aclose(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _list_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(_backends, "_factories", dict(_backends._factories))


def _register(backend: PretendBackend) -> None:
    async def factory() -> Any:
        return backend

    register_backend("pretend", factory)


def test_a_backend_that_works_passes_and_one_whose_box_cannot_be_closed_does_not() -> None:
    _register(PretendBackend())
    assert check_backend("pretend") is None
    del _backends._factories["pretend"]
    _register(PretendBackend(close=SandboxError("the daemon\nis gone")))
    assert check_backend("pretend") == "the daemon is gone"


@pytest.mark.parametrize("where", ["create", "run", "close"])
def test_a_bug_of_a_backend_reaches_who_checks_it(where: str) -> None:
    error = KeyError("a bug")
    _register(PretendBackend(**{where: error}))
    with pytest.raises(KeyError, match="a bug"):
        check_backend("pretend")


async def test_a_bug_beside_a_failure_is_not_hidden_by_it() -> None:
    _register(PretendBackend(run=SandboxError("died"), close=KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        check_backend("pretend")


async def test_forks_that_wait_for_each_other_give_up_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palaestra.sandboxes._managed._FORK_S", 0.2)
    backend = ManagedBackend(PretendBackend(), Admission(max_boxes=2))
    boxes = [await backend.create(SandboxSpec()) for _ in range(2)]

    async def refused(box: Sandbox) -> None:
        with pytest.raises(SandboxError, match=rf"{box.id}, holds a place itself; .*raise Admission.max_boxes"):
            await fork(backend, box, SandboxSpec())

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for box in boxes:
            group.create_task(refused(box))
    await boxes[0].aclose()
    twin = await fork(backend, boxes[1], SandboxSpec())
    assert twin.id != boxes[1].id
    await backend.aclose()


async def test_a_box_that_cannot_be_closed_is_one_error_and_stays_on_the_list() -> None:
    backend = ManagedBackend(PretendBackend(close=SandboxError("the daemon is gone")), Admission())
    box = await backend.create(SandboxSpec())
    with pytest.raises(SandboxError, match="the daemon is gone"):
        await backend.aclose()
    assert [lease.id for lease in list_leases()] == [box.id]
