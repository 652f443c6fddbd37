"""The host's end against a server that lies: whatever comes out of a box, it is never taken for a result."""

from __future__ import annotations

import errno
import json
import struct

import pytest

from palaestra.errors import SandboxError
from palaestra.sandboxes import Ended, SandboxSpec
from palaestra.sandboxes._box import Box
from palaestra.sandboxes._host import Death, WhoseMemory

_HONEST = {
    "id": 1, "stopped": "", "status": 0, "cpu_s": 0.0, "oom_kills": 0, "at_limit": 0, "wall_s": 0.1, "stdout_total": 2,
    "stderr_total": 1, "stdout_bytes": 2, "survivors": 0,
}  # fmt: skip


class Recording:
    """A box whose answer was recorded beforehand."""

    handle = ""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.num_kills = 0
        self.ran_out: list[WhoseMemory] = []
        self.died = Death()

    async def read_exactly(self, count: int) -> bytes:
        if len(self.answer) < count:
            raise EOFError
        data, self.answer = self.answer[:count], self.answer[count:]
        return data

    def write(self, data: bytes) -> None:
        pass

    def kill(self) -> None:
        self.num_kills += 1

    async def release(self) -> None:
        pass

    def whose_memory(self) -> WhoseMemory:
        return self.ran_out.pop(0) if self.ran_out else ""

    async def death(self) -> Death:
        return self.died

    def memory(self) -> tuple[int | None, int | None]:
        return None, None


def _frame(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("!II", len(text), len(body)) + text + body


def _box(recording: Recording) -> Box:
    return Box("test", recording, recording, SandboxSpec())


async def test_an_honest_answer_becomes_a_result() -> None:
    result = await _box(Recording(_frame(_HONEST, b"abc"))).exec(["x"])
    assert (result.ended, result.exit_code, result.stdout, result.stderr) == (Ended.EXIT, 0, b"ab", b"c")


_BEGAN = _frame({"id": 1, "began": True})


@pytest.mark.parametrize("began", [b"", _BEGAN])
@pytest.mark.parametrize(
    "answer",
    [
        b"garbage that is no frame at all",
        struct.pack("!II", 1 << 31, 0),
        struct.pack("!II", 2, 1 << 31) + b"{}",
        struct.pack("!II", 3, 0) + b"\xff\xff\xff",
        _frame([]),
        _frame({}),
        _frame({**_HONEST, "id": 2}, b"abc"),
        _frame({**_HONEST, "id": 0}, b"abc"),
        _frame({"id": 1}),
        _frame({**_HONEST, "status": None}, b"abc"),
        _frame({**_HONEST, "stdout_bytes": 4}, b"abc"),
        _frame({**_HONEST, "stdout_bytes": -1}, b"abc"),
        _frame({**_HONEST, "stdout_total": 1}, b"abc"),
        _frame({**_HONEST, "status": 1 << 70}, b"abc"),
        _frame({**_HONEST, "status": float("inf")}, b"abc"),
        struct.pack("!II", 60_000, 0) + b"[" * 60_000,
        _frame({"id": 1, "stream": 0}, b"unasked") + _frame(_HONEST, b"abc"),
        _frame({"id": 1, "net": 1, "do": "open"}) + _frame(_HONEST, b"abc"),
    ],
)
async def test_a_malformed_answer_is_the_agents_doing_and_ends_the_box(began: bytes, answer: bytes) -> None:
    recording = Recording(began + answer)
    box = _box(recording)
    result = await box.exec(["x"])
    assert (result.ended, result.exit_code, result.stdout) == (Ended.SANDBOX_KILLED, None, b"")
    assert recording.num_kills == 1
    assert (await box.run_python("1")).ended is Ended.SANDBOX_KILLED, "what the agent ended stays its doing"
    with pytest.raises(OSError, match=r"destroyed|tampered"):
        await box.read_file("/x")
    with pytest.raises(SandboxError, match="unusable"):
        await box.stats()


@pytest.mark.parametrize("answer", [_BEGAN, _BEGAN + _frame(_HONEST, b"abc")[:-1]])
async def test_a_box_that_ends_while_it_runs_is_the_agents_doing_unless_the_host_knows_better(answer: bytes) -> None:
    for death, ended in ((Death(256), Ended.SANDBOX_KILLED), (Death(9, is_oom=True), Ended.OOM)):
        recording = Recording(answer)
        recording.died = death
        assert (await _box(recording).exec(["x"])).ended is ended
    for death, reason in (
        (Death(9), "killed from outside"),
        (Death(0), "connection to this process was lost"),
        (Death(by_host="its zygote ended"), "its zygote ended"),
    ):
        recording = Recording(answer)
        recording.died = death
        with pytest.raises(SandboxError, match=reason):
            await _box(recording).exec(["x"])


async def test_a_box_that_ended_before_it_began_is_our_failure() -> None:
    recording = Recording(b"")
    recording.died = Death(256)
    with pytest.raises(SandboxError, match="died while it was idle"):
        await _box(recording).exec(["x"])
    assert recording.num_kills == 1


async def test_what_the_agent_left_and_the_server_could_not_bear_is_the_agents_doing() -> None:
    recording = Recording(b"")
    recording.died = Death(9, is_oom=True)
    box = _box(recording)
    with pytest.raises(OSError, match="destroyed by the agent's code") as failure:
        await box.read_file("/x")
    assert failure.value.errno == errno.ENOMEM
    assert (await box.exec(["x"])).ended is Ended.OOM
    recording = Recording(b"")
    recording.died = Death(9, is_oom=True)
    assert (await _box(recording).exec(["x"])).ended is Ended.OOM


@pytest.mark.parametrize("seen", [True, False])
async def test_a_kill_for_memory_is_the_agents_doing_only_when_it_met_its_own_limit(seen: bool) -> None:
    killed = {**_HONEST, "status": 9}
    for whose, counts in (("box", (1, 3)), ("host", (1, 0))):
        told = {} if seen else dict(zip(("oom_kills", "at_limit"), counts, strict=True))
        recording = Recording(_frame({**killed, **told}, b"abc"))
        recording.ran_out = [whose] if seen else []  # type: ignore[list-item]
        box = _box(recording)
        if whose == "box":
            assert (await box.exec(["x"])).ended is Ended.OOM
            continue
        with pytest.raises(SandboxError, match="the host ran out of memory"):
            await box.exec(["x"])
        with pytest.raises(SandboxError, match="unusable"):
            await box.exec(["x"])


async def test_memory_that_ran_out_in_one_execution_is_not_taken_for_the_end_of_the_next() -> None:
    recording = Recording(_frame(_HONEST, b"abc") + _frame({**_HONEST, "id": 2, "status": 256}, b"abc"))
    recording.ran_out = ["box"]
    box = _box(recording)
    assert (await box.exec(["x"])).is_ok, "a child of it was killed, and it went on"
    assert (await box.exec(["x"])).ended is Ended.EXIT


async def test_output_that_nobody_can_take_ends_the_box_as_ours() -> None:
    stream = _frame({"id": 1, "stream": 0}, b"piece")
    box = _box(Recording(_BEGAN + stream + _frame(_HONEST, b"abc")))

    def fails(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await box.exec(["x"], on_output=fails)
    with pytest.raises(SandboxError, match="unusable: a request was given up"):
        await box.exec(["x"])


async def test_a_tree_is_never_larger_than_what_was_asked_for() -> None:
    pieces = b"".join(_frame({"id": 1, "stream": 0}, bytes(1 << 20)) for _ in range(30))
    with pytest.raises(SandboxError, match="died during pack"):
        await _box(Recording(pieces + _frame({"id": 1}))).get_tree("/x", max_bytes=1 << 20, max_files=1)


async def test_a_box_that_dies_without_agent_code_is_our_failure() -> None:
    for answer in (b"", b"gar", _frame({"id": 7})):
        with pytest.raises(SandboxError, match="died"):
            await _box(Recording(answer)).read_file("/x")
    with pytest.raises(SandboxError, match="did not start"):
        await _box(Recording(b"")).wait_ready(1.0)


async def test_a_server_that_cannot_fork_is_our_failure() -> None:
    recording = Recording(_frame({"id": 1, "errno": 11, "error": "try again"}))
    with pytest.raises(SandboxError, match="try again"):
        await _box(recording).exec(["x"])
    assert recording.num_kills == 1
