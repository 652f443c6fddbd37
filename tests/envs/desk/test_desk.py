"""`ToolDesk` on its real server: solvable, exact, repeatable, and every episode alone with its database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from palaestra.envs.desk import ToolDesk
from palaestra.resources import Resources
from palaestra.types import Form, Message, ToolCall

FORMS: tuple[Form, ...] = ("compact", "full")
Call = Callable[..., Message]
pytestmark = pytest.mark.asyncio(loop_scope="module")


def target_of(env: ToolDesk) -> int:
    """The id of the first row that the task wants changed."""
    return int(env.task.data["changes"][0]["id"])


async def find_task(env: ToolDesk, verb: str) -> int:
    """The index of a train task with that one verb."""
    for index in range(200):
        steps = env.make_task("train", index).data["request"]["steps"]
        if [step["verb"] for step in steps] == [verb]:
            return index
    raise AssertionError(f"no {verb} task among 200")


@pytest.mark.parametrize("form", FORMS)
async def test_expert_solves_every_task(resources: Resources, play: Any, form: Form) -> None:
    for split in ("train", "validation", "test"):
        env = ToolDesk(form=form, split=split, resources=resources)
        for index in range(60):
            played = await play(env, index)
            assert played.facts == {"success": 1.0, "unsafe": 0.0, "missing": 0.0, "extra": 0.0}
            assert played.info["outcome"] == "scored"
            assert played.info["invalid_calls"] == 0
            assert 4 <= len(env.turns) <= 5


async def test_sloppy_player_leaves_something_to_learn(resources: Resources, play: Any) -> None:
    env = ToolDesk(form="compact", resources=resources)
    played = [await play(env, index, slip_rate=0.2) for index in range(300)]
    assert 0.35 <= sum(p.facts["success"] for p in played) / len(played) <= 0.55
    assert any(p.facts["unsafe"] for p in played)
    assert any(p.facts["success"] and len(p.conversation) > 12 for p in played), "no slip was recovered from"


async def test_random_agent_hardly_ever_succeeds(resources: Resources) -> None:
    env = ToolDesk(form="compact", resources=resources)
    env.action_space.seed(0)
    num_successes = 0.0
    for index in range(100):
        await env.areset(options={"index": index})
        is_over = False
        while not is_over:
            _, _, terminated, truncated, info = await env.astep(env.action_space.sample())
            is_over = terminated or truncated
        num_successes += info["facts"]["success"]
    assert num_successes <= 1


@pytest.mark.parametrize(
    "action", [Message("assistant", "ok"), Message("assistant", tool_calls=(ToolCall(name="done"),))]
)
async def test_doing_nothing_scores_nothing(resources: Resources, action: Message) -> None:
    env = ToolDesk(resources=resources)
    for index in range(20):
        await env.areset(options={"index": index})
        _, _, terminated, _, info = await env.astep(action)
        assert terminated
        assert info["facts"]["success"] == 0.0
        assert info["facts"]["unsafe"] == 0.0


@pytest.mark.parametrize("form", FORMS)
async def test_same_task_and_actions_give_the_same_bytes(resources: Resources, play: Any, form: Form) -> None:
    for index in range(10):
        one, other = [await play(ToolDesk(form=form, resources=resources), index, slip_rate=0.3) for _ in range(2)]
        said = [json.dumps([m.to_json() for m in played.conversation]) for played in (one, other)]
        assert said[0] == said[1]
        assert (one.reward, one.facts) == (other.reward, other.facts)


async def test_same_seed_draws_the_same_task(resources: Resources) -> None:
    env = ToolDesk(resources=resources)
    first = await env.areset(seed=5)
    await env.areset()
    assert await env.areset(seed=5) == first


async def test_parallel_episodes_equal_serial_ones(resources: Resources, play: Any) -> None:
    async def play_one(index: int) -> Any:
        return await play(ToolDesk(form="compact", resources=resources), index, slip_rate=0.3)

    serial = [await play_one(index) for index in range(48)]
    parallel: list[Any] = []
    for start in range(0, 48, 16):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(play_one(index)) for index in range(start, start + 16)]
        parallel += [task.result() for task in tasks]
    assert parallel == serial


async def test_episodes_of_one_task_do_not_touch_each_other(resources: Resources, play: Any, call: Call) -> None:
    env, neighbour = ToolDesk(resources=resources), ToolDesk(resources=resources)
    index = await find_task(env, "close")
    await env.areset(options={"index": index})
    await play(neighbour, index)
    observation, *_ = await env.astep(call("close_ticket", ticket=target_of(env)))
    assert observation[0].content == "ok"
    *_, info = await env.astep(call("done"))
    assert info["facts"]["success"] == 1.0


async def test_one_change_too_many_spoils_success(resources: Resources, call: Call) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": await find_task(env, "close")})
    tickets = env.task.data["tables"]["tickets"]
    other = next(t["id"] for t in tickets if t["id"] != target_of(env) and t["status"] == "open")
    await env.astep(call("close_ticket", ticket=target_of(env)))
    await env.astep(call("close_ticket", ticket=other))
    _, reward, *_, info = await env.astep(call("done"))
    assert info["facts"] == {"success": 0.0, "unsafe": 1.0, "missing": 0.0, "extra": 1.0}
    assert reward < 0


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("set_priority", {"level": "low"}), ("assign_ticket", {"team": "legal"}), ("close_ticket", {})],
)
async def test_a_change_whose_subject_is_not_the_tickets_is_refused_and_changes_nothing(
    resources: Resources, call: Call, tool: str, arguments: dict[str, Any]
) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": await find_task(env, "close")})
    ticket = target_of(env)
    subject = next(row["subject"] for row in env.task.data["tables"]["tickets"] if row["id"] == ticket)
    observation, *_, info = await env.astep(call(tool, subject=f"no {subject}", ticket=ticket, **arguments))
    assert observation[0].content == f"error: ticket {ticket} is not about no {subject}"
    assert info["invalid_calls"] == 0
    observation, *_ = await env.astep(call("close_ticket", subject=f" {subject.upper()} ", ticket=ticket))
    assert observation[0].content == "ok"
    *_, info = await env.astep(call("done"))
    assert info["facts"] == {"success": 1.0, "unsafe": 0.0, "missing": 0.0, "extra": 0.0}


@pytest.mark.parametrize("tool", ["refund_order", "decline_refund"])
async def test_a_settlement_of_another_item_is_refused_and_changes_nothing(
    resources: Resources, call: Call, tool: str
) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": await find_task(env, "close")})
    order = env.task.data["tables"]["orders"][0]
    said = [
        (await env.astep(call(tool, item=item, order=order["id"])))[0][0].content
        for item in (f"no {order['item']}", order["item"])
    ]
    await env.aclose()
    assert said == [f"error: order {order['id']} is not about no {order['item']}", "ok"]


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("close_ticket", {}),
        ("close_ticket", {"ticket": "printer"}),
        ("close_ticket", {"ticket": 100}),
        ("close_ticket", {"ticket": 10, "force": True}),
        ("set_priority", {"ticket": 10, "level": "extreme"}),
        ("find_customer", {"name": "x" * 81}),
        ("find_customer", {"name": "\ud800"}),
        ("drop_tables", {}),
    ],
)
async def test_an_invalid_call_is_an_observation_and_counted(
    resources: Resources, call: Call, tool: str, arguments: dict[str, Any]
) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": 0})
    observation, reward, terminated, _, info = await env.astep(call(tool, **arguments))
    assert observation[0].content.startswith("invalid call: ")
    assert (reward, terminated, info["invalid_calls"]) == (0.0, False, 1)
    await env.aclose()


@pytest.mark.parametrize("name", ["", "nobody here", "a/../b?x=1&name=y", "%00\x00", "Ω ünïcode \n"])
async def test_any_text_may_be_looked_up(resources: Resources, call: Call, name: str) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": 0})
    observation, *_, info = await env.astep(call("find_customer", name=name))
    assert observation[0].content == f"error: no customer {name}"
    assert info["invalid_calls"] == 0
    await env.aclose()


async def test_names_are_found_in_any_case_and_spacing(resources: Resources, call: Call) -> None:
    env = ToolDesk(form="compact", resources=resources)
    await env.areset(options={"index": 0})
    customer = env.task.data["tables"]["customers"][0]
    observation, *_ = await env.astep(call("find_customer", name=f" {customer['name'].upper()}  "))
    assert observation[0].content == f"customer {customer['id']}"
    await env.aclose()


async def test_the_desk_refuses_what_makes_no_sense(resources: Resources, call: Call) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": await find_task(env, "close")})
    ticket = target_of(env)
    customer = env.task.data["tables"]["customers"][0]["id"]
    order = env.task.data["tables"]["orders"][0]["id"]
    said = []
    for action in (
        call("close_ticket", ticket=ticket),
        call("set_priority", ticket=ticket, level="low"),
        call("list_tickets", customer=ticket),
        call("assign_ticket", ticket=customer, team="legal"),
        call("decline_refund", order=order),
        call("refund_order", order=order),
        call("refund_order", order=ticket),
    ):
        observation, *_ = await env.astep(action)
        said.append(observation[0].content)
    assert said == [
        "ok",
        f"error: ticket {ticket} is closed",
        f"error: no customer {ticket}",
        f"error: no ticket {customer}",
        "ok",
        f"error: order {order} is declined",
        f"error: no order {ticket}",
    ]
    await env.aclose()


async def test_out_of_turns_is_truncated_and_no_success(resources: Resources, call: Call) -> None:
    env = ToolDesk(resources=resources)
    await env.areset(options={"index": await find_task(env, "close")})
    actions = [call("close_ticket", ticket=target_of(env))] + [call("find_customer", name="ana ruiz")] * 7
    for action in actions:
        _, _, terminated, truncated, info = await env.astep(action)
    assert (terminated, truncated, info["outcome"]) == (False, True, "truncated")
    assert info["facts"]["success"] == 0.0
