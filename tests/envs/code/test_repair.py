"""CodeRepair episodes, with real sandboxes: what the expert, an idle, a random and a sloppy player reach."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from palaestra.envs import EnvLimits
from palaestra.envs.code import CodeRepair
from palaestra.errors import SandboxError, TaskError
from palaestra.resources import Resources
from palaestra.types import Form, Message
from tests.envs.code.conftest import Pick, Played, call, play, play_expert, say

_FORMS: tuple[Form, ...] = ("compact", "full")


def _count(sandbox: str, full: int) -> int:
    """Fewer episodes in containers, which take a second each to make."""
    return full if sandbox == "jail" else max(2, full // 16)


def _sloppy(rng: random.Random) -> Pick:
    def pick(env: CodeRepair, conversation: Sequence[Message]) -> Message:
        decision = env.expert().decide(env.task, conversation)
        return rng.choice(decision.slips) if rng.random() < 0.2 else decision.best

    return pick


async def _play_many(form: Form, sandbox: str, resources: Resources, count: int, *, at_once: int) -> list[Played]:
    """Expert episodes of the first `count` test tasks, `at_once` at a time, in the order of their index."""
    played: dict[int, Played] = {}
    indices = iter(range(count))

    async def worker() -> None:
        env = CodeRepair(form=form, split="test", sandbox=sandbox, resources=resources)
        for index in indices:
            played[index] = await play(env, play_expert, index=index)
        await env.aclose()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())
    return [played[index] for index in range(count)]


@pytest.mark.parametrize("form", _FORMS)
async def test_the_expert_solves_every_task(form: Form, sandbox: str, resources: Resources) -> None:
    count = _count(sandbox, 64)
    episodes = await _play_many(form, sandbox, resources, count, at_once=4)
    assert [episode.facts for episode in episodes] == [{"success": 1.0, "tests_passed": 1.0, "unsafe": 0.0}] * count
    assert {episode.info["outcome"] for episode in episodes} == {"scored"}
    assert {episode.info["invalid_calls"] for episode in episodes} == {0}


@pytest.mark.parametrize("form", _FORMS)
async def test_parallel_equals_serial_byte_for_byte(form: Form, sandbox: str, resources: Resources) -> None:
    count = _count(sandbox, 16)
    parallel = await _play_many(form, sandbox, resources, count, at_once=count // 2)
    assert parallel == await _play_many(form, sandbox, resources, count, at_once=1)


@pytest.mark.parametrize("form", _FORMS)
async def test_doing_nothing_scores_nothing(form: Form, sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form=form, sandbox=sandbox, resources=resources)
    for index in range(_count(sandbox, 8)):
        played = await play(env, say(call("done")), index=index)
        assert played.facts["success"] == 0.0
        assert played.reward == pytest.approx(0.1)  # its one call was valid
        assert (await play(env, say(Message("assistant", "It is fine.")), index=index)).facts["success"] == 0.0


@pytest.mark.parametrize("form", _FORMS)
async def test_random_play_scores_next_to_nothing(form: Form, sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form=form, sandbox=sandbox, resources=resources)
    env.action_space.seed(0)
    for index in range(_count(sandbox, 32)):
        played = await play(env, lambda env, _: env.action_space.sample(), index=index)
        assert played.facts["success"] == 0.0


async def test_a_sloppy_player_leaves_something_to_learn(sandbox: str, resources: Resources) -> None:
    if sandbox != "jail":
        pytest.skip("the player's success does not depend on the sandbox, and containers are slow to make")
    env = CodeRepair(form="compact", sandbox=sandbox, resources=resources)
    pick = _sloppy(random.Random(0))
    successes = [(await play(env, pick, index=index)).facts["success"] for index in range(100)]
    assert 0.3 < sum(successes) / 100 < 0.65


async def test_the_expert_writes_again_after_a_failed_run(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form="compact", sandbox=sandbox, resources=resources, limits=EnvLimits(max_turns=8))
    is_first_write = True

    def slip_once(env: CodeRepair, conversation: Sequence[Message]) -> Message:
        nonlocal is_first_write
        decision = env.expert().decide(env.task, conversation)
        if is_first_write and decision.best.tool_calls[0].name == "write":
            is_first_write = False
            return decision.slips[0]
        return decision.best

    played = await play(env, slip_once, index=0)
    assert played.facts["success"] == 1.0
    assert [m.content for m in played.conversation if m.role == "tool"] == [
        "fail 3",
        "ok",
        "fail 3",
        "ok",
        "pass",
        "done",
    ]


async def test_a_compact_episode_word_for_word(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form="compact", sandbox=sandbox, resources=resources)
    played = await play(env, play_expert, index=0)
    said = [(m.role, m.content or dict(m.tool_calls[0].arguments)) for m in played.conversation]
    assert said == [
        ("user", "fix 1 x plus y 2 floor 7 3 mod 9"),
        ("assistant", {}),
        ("tool", "fail 3"),
        ("assistant", {"line": 3, "text": "return t % 9"}),
        ("tool", "ok"),
        ("assistant", {}),
        ("tool", "pass"),
        ("assistant", {}),
        ("tool", "done"),
    ]
    assert played.reward == pytest.approx(1.0 + 0.1 + 0.1 * (1 - 4 / 6))


async def test_a_run_names_the_first_wrong_line(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form="compact", sandbox=sandbox, resources=resources, limits=EnvLimits(max_turns=20))
    await env.areset(options={"index": 0})
    right = env.task.data["solution"]

    async def run_with(*codes: str) -> str:
        for line, text in enumerate(codes, start=1):
            await env.astep(call("write", line=line, text=text))
        observation, *_ = await env.astep(call("run"))
        return observation[0].content

    assert await run_with(*right) == "pass"
    assert await run_with("t = x - y", right[1], "return t - 9") == "fail 1"
    assert await run_with(right[0], "t = 3") == "fail 2"
    assert await run_with(right[0], right[1], "return (") == "fail 3"
    assert await run_with(right[0], "return 3", right[2]) == "fail 1"  # no value to trace: the first line is named
    observation, *_ = await env.astep(call("read"))
    assert observation[0].content == "1 t = x + y 2 return 3 3 return t % 9"
    await env.aclose()


async def test_running_out_of_turns_is_truncated_without_success(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form="compact", sandbox=sandbox, resources=resources)
    played = await play(env, say(*[call("read")] * 6))
    assert (played.info["outcome"], played.facts["success"]) == ("truncated", 0.0)


async def test_compact_tools_refuse_what_is_no_line(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form="compact", sandbox=sandbox, resources=resources, limits=EnvLimits(max_turns=20))
    await env.areset(options={"index": 0})
    for line, text, answer in ((0, "x", "no line 0"), (9, "x", "no line 9"), (1, "a\nb", "not one line")):
        observation, *_ = await env.astep(call("write", line=line, text=text))
        assert observation[0].content == f"error: {answer}"
    *_, info = await env.astep(call("write", path="solution.py", content="x"))
    assert info["invalid_calls"] == 1
    await env.aclose()


async def test_full_tools_work_on_files(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(sandbox=sandbox, resources=resources)
    await env.areset(options={"index": 0})

    async def answer(message: Message) -> str:
        observation, *_ = await env.astep(message)
        return observation[0].content

    assert (await answer(call("read"))) == env.task.data["source"]
    assert (await answer(call("read", path="/workspace/solution.py"))) == env.task.data["source"]
    assert (await answer(call("write", path="a/b.py", content="print(6 * 7)\n"))) == "wrote 1 lines to a/b.py"
    assert (await answer(call("run", command="python3 a/b.py; exit 3"))) == "exit code 3\n42"
    assert " of 6 examples pass; " in await answer(call("run"))
    assert "No such file" in await answer(call("read", path="missing.py"))
    assert "cannot write" in await answer(call("write", path="/proc/x", content=""))
    assert "cannot read" in await answer(call("read", path="a\0b"))
    await answer(call("run", command="rm solution.py"))
    assert (await answer(call("run"))) == "error: cannot read solution.py"
    *_, info = await env.astep(call("done"))
    assert info["facts"]["success"] == 0.0


async def test_a_shell_can_repair_the_file_too(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(sandbox=sandbox, resources=resources)
    task = env.make_task("train", 2)
    heredoc = f"cat > solution.py <<'EOF'\n{task.data['solution']}EOF"
    played = await play(env, say(call("run", command=heredoc), call("done")), task=task)
    assert played.facts["success"] == 1.0


async def test_a_task_of_the_other_form_is_refused(sandbox: str, resources: Resources) -> None:
    env = CodeRepair(form="full", sandbox=sandbox, resources=resources)
    with pytest.raises(TaskError, match="has form 'compact'"):
        await env.areset(options={"task": CodeRepair(form="compact").make_task("train", 0)})
    await env.aclose()


def _servers() -> set[int]:
    """Pids of the processes of this user's sandboxes that descend from this process, as the host sees them."""
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*"):
            children = [int(pid) for pid in (task / "children").read_text().split()]
            found.update(children)
            waiting += children
    return found


@pytest.mark.parametrize("form", _FORMS)
async def test_a_killed_sandbox_raises_and_never_scores(form: Form, sandbox: str, resources: Resources) -> None:
    if sandbox != "jail":
        pytest.skip("a container's processes are not ours to kill")
    env = CodeRepair(form=form, sandbox=sandbox, resources=resources, num_ready=1)
    await env.areset(options={"index": 0})
    await env.astep(call("run"))
    for pid in sorted(_servers(), reverse=True):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(SandboxError):
        await env.astep(call("done"))
    await env.aclose()


async def test_nothing_is_left_after_close() -> None:
    before = _servers()
    descriptors = len(os.listdir("/proc/self/fd"))
    async with Resources() as resources:
        await _play_many("compact", "jail", resources, 8, at_once=4)
        env = CodeRepair(resources=resources)
        await env.areset(options={"index": 0})
        await env.astep(call("run"))  # left in the middle
        await env.aclose()
    assert _servers() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
