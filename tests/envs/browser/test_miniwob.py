"""The MiniWoB environment on the real browser."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import numpy as np
import pytest

from palaestra.envs.browser import MiniWoB
from palaestra.envs.browser._pages import COMPACT_PAGES, PAGES
from palaestra.envs.browser._shelf import TabShelf
from palaestra.errors import SandboxError, TaskError
from palaestra.resources import Resources
from palaestra.sandboxes.browser import BrowserConfig
from palaestra.types import Form, Message
from tests.envs.browser.players import Played, call, play_expert, play_fixed, play_sloppy, task_of
from tests.sandboxes.hostview import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

_FORMS_AND_PAGES = [("compact", page) for page in COMPACT_PAGES] + [("full", page) for page in PAGES]
_TASKS_PER_PAGE = 20


async def _shelf_of(env: MiniWoB) -> TabShelf:
    return await env.resources.get(env._key, env._start_shelf)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "page"), _FORMS_AND_PAGES)
async def test_expert_solves_the_page(resources: Resources, form: Form, page: str) -> None:
    env = MiniWoB(form=form, pages=[page], resources=resources)
    tasks = [env.make_task("train", index) for index in range(_TASKS_PER_PAGE)]
    tasks += [env.make_task("test", index) for index in range(min(5, env.num_tasks["test"]))]
    failed = [task.id for task in tasks if (await play_expert(env, task)).success < 1.0]
    await env.aclose()
    assert failed == []


async def test_random_agent_is_near_the_floor(resources: Resources) -> None:
    env = MiniWoB(form="compact", resources=resources)
    env.action_space.seed(0)
    successes = []
    for index in range(60):
        actions = [env.action_space.sample() for _ in range(env.limits.max_turns)]
        successes.append((await play_fixed(env, env.make_task("train", index), actions)).success)
    await env.aclose()
    assert np.mean(successes) <= 0.05


async def test_slips_make_the_expert_fail_often_but_not_always(resources: Resources) -> None:
    env, rng = MiniWoB(form="compact", resources=resources), random.Random(0)
    played = [await play_sloppy(env, env.make_task("train", index), rng, 0.2) for index in range(150)]
    await env.aclose()
    assert 0.35 <= np.mean([one.success for one in played]) <= 0.65


@pytest.mark.parametrize("form", ["compact", "full"])
async def test_same_seed_same_bytes_whatever_was_played_before(resources: Resources, form: Form) -> None:
    env = MiniWoB(form=form, resources=resources)
    tasks = [env.make_task("train", index) for index in range(2 * len(PAGES))]
    first = [(await play_expert(env, task)).conversation for task in tasks]
    rng = random.Random(1)
    for task in tasks[:20]:
        await play_sloppy(env, task, rng, 0.7)  # leave half-filled forms and open dialogs behind
    again = [(await play_expert(env, task)).conversation for task in reversed(tasks)]
    await env.aclose()
    assert first == list(reversed(again))


async def test_concurrent_equals_serial(resources: Resources) -> None:
    envs = [MiniWoB(form="compact", resources=resources) for _ in range(8)]
    tasks = [envs[0].make_task("train", index) for index in range(24)]
    serial = [await play_expert(envs[0], task) for task in tasks]
    parallel: dict[str, Played] = {}

    async def work(number: int) -> None:
        for task in tasks[number::8]:
            parallel[task.id] = await play_expert(envs[number], task)

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(work(number))
    for env in envs:
        await env.aclose()
    assert [parallel[task.id] for task in tasks] == serial


async def test_page_ends_the_episode_with_its_own_verdict(resources: Resources) -> None:
    env = MiniWoB(form="compact", resources=resources)
    await env.areset(options={"task": task_of("login-user", 3)})
    _, reward, terminated, truncated, info = await env.astep(call("click", ref=3))
    assert (terminated, truncated) == (True, False)
    assert info["facts"] == {"success": 0.0, "page_reward": -1.0}
    assert reward < 0.2
    with pytest.raises(TaskError, match="over"):
        await env.astep(call("click", ref=3))
    await env.aclose()


async def test_partly_right_is_not_a_success(resources: Resources) -> None:
    env = MiniWoB(form="compact", resources=resources)
    task = task_of("click-checkboxes", 4)  # one of three boxes is asked for
    await env.areset(options={"task": task})
    _, _, terminated, _, info = await env.astep(call("click", ref=4))
    await env.aclose()
    assert terminated
    assert 0.0 < info["facts"]["page_reward"] < 1.0
    assert info["facts"]["success"] == 0.0


async def test_words_alone_give_up(resources: Resources) -> None:
    env = MiniWoB(form="compact", resources=resources)
    played = await play_fixed(env, task_of("login-user", 3), [Message("assistant", "done")])
    await env.aclose()
    assert (played.success, played.is_truncated) == (0.0, False)


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (call("click", ref=9), "error: no element 9"),
        (call("type", ref=3, text="x"), "error: element 3 takes no text"),
        (call("select", ref=1, option="x"), "error: element 1 has no options"),
        (call("click", ref=0), "invalid call: ref: "),
        (call("type", ref=1), "invalid call: text: "),
        (call("press", ref=1), "invalid call: no tool 'press'"),
    ],
)
async def test_bad_call_is_an_observation(resources: Resources, action: Message, answer: str) -> None:
    env = MiniWoB(form="compact", resources=resources)
    await env.areset(options={"task": task_of("login-user", 3)})
    observation, _, terminated, truncated, _ = await env.astep(action)
    await env.aclose()
    assert observation[0].content.startswith(answer)
    assert not terminated
    assert not truncated


async def test_unknown_option_is_an_observation(resources: Resources) -> None:
    env = MiniWoB(form="compact", resources=resources)
    await env.areset(options={"task": task_of("choose-list", 3)})
    observation, *_ = await env.astep(call("select", ref=1, option="nowhere"))
    await env.aclose()
    assert observation[0].content == 'error: element 1 has no option "nowhere"'


async def test_waiting_does_not_change_the_page(resources: Resources) -> None:
    env = MiniWoB(form="full", resources=resources)
    await env.areset(options={"task": task_of("login-user", 3)})
    await asyncio.sleep(1.1)  # the page's own countdown ticks each second
    first, *_ = await env.astep(call("click", ref=1))
    second, *_ = await env.astep(call("click", ref=1))
    await env.aclose()
    assert first == second


async def test_killed_browser_is_an_error_and_the_next_episode_has_another(chromium: None) -> None:
    async with Resources() as resources:
        env = MiniWoB(form="compact", resources=resources, browser=BrowserConfig(max_tabs=2))
        other = MiniWoB(form="compact", resources=resources, browser=BrowserConfig(max_tabs=2))
        await env.areset(options={"task": task_of("login-user", 3)})
        pool = (await _shelf_of(env)).pool
        killed = pool.pid
        os.kill(killed, signal.SIGKILL)
        assert await eventually(lambda: killed not in pool.pids)  # until it is known it may still answer once
        with pytest.raises(SandboxError):
            await env.astep(call("click", ref=1))
        for survivor in (env, other):
            assert (await play_expert(survivor, task_of("login-user", 3))).success == 1.0
        assert (await _shelf_of(env)).pool.pids == [(await _shelf_of(other)).pool.pid] != [killed]
        await env.aclose()
        await other.aclose()


async def test_environments_take_only_the_tabs_they_use(resources: Resources) -> None:
    env = MiniWoB(form="compact", resources=resources)
    for index in range(3):
        await play_expert(env, env.make_task("train", index))
    shelf = await _shelf_of(env)
    assert shelf.num_used == 0
    await env.areset(options={"task": task_of("login-user", 3)})
    assert shelf.num_used == 1
    await env.aclose()
    assert shelf.num_used == 0
