"""The scripted expert of the service desk: reads the conversation in either form, finds the next call.

Invariant: it is a function of the conversation alone, so whatever harmless slip was made, it goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from palaestra.envs._experts import Decision
from palaestra.envs.desk._tasks import Row
from palaestra.envs.desk._wording import Request, Step, parse_request, parse_result
from palaestra.envs.desk._words import LAST_NAMES, LEVELS, REFUNDABLE, TEAMS
from palaestra.types import Message, Task, ToolCall

_DONE = Message("assistant", tool_calls=(ToolCall(name="done"),))
_GIVE_UP = (_DONE, Message("assistant", "ok"))
"""Two ways of ending too early."""


@dataclass(slots=True)
class _Known:
    """What the conversation has shown so far; `acts` are the changes tried, in order."""

    customer: int | None = None
    tickets: dict[str, Row] = field(default_factory=dict)
    orders: dict[str, Row] = field(default_factory=dict)
    acts: list[ToolCall] = field(default_factory=list)


class DeskExpert:
    """Find the customer, list what is asked about, change it, say done."""

    def decide(self, task: Task, conversation: Sequence[Message]) -> Decision:
        """The next message, by what is still unknown or undone."""
        asked = parse_request(next(m.content for m in conversation if m.role == "user"))
        known = _read(asked, conversation)
        if known.customer is None:
            wrong = _call("find_customer", name=_other_name(asked.name))
            return Decision(_call("find_customer", name=asked.name), (wrong, *_GIVE_UP))
        listing = "list_orders" if asked.steps[0].verb == "refund" else "list_tickets"
        listed = known.orders if listing == "list_orders" else known.tickets
        if not listed:
            wrong = _call(listing, customer=(known.customer + 1) % 100)
            return Decision(_call(listing, customer=known.customer), (wrong, *_GIVE_UP))
        for step in asked.steps:
            act = _act(step, listed)
            if act is not None and not _is_done(act, known.acts):
                return Decision(Message("assistant", tool_calls=(act,)), _wrong_acts(act, step, listed))
        return Decision(_DONE, _needless_acts(asked, listed))


def _read(asked: Request, conversation: Sequence[Message]) -> _Known:
    known = _Known()
    for call, answer in _exchanges(conversation):
        arguments = call.arguments
        if call.name == "find_customer" and _same_name(arguments.get("name"), asked.name):
            known.customer = next((row["id"] for row in parse_result("customer", answer)), known.customer)
        elif call.name == "list_tickets" and arguments.get("customer") == known.customer:
            known.tickets |= {row["subject"]: row for row in parse_result("ticket", answer)}
        elif call.name == "list_orders" and arguments.get("customer") == known.customer:
            known.orders |= {row["item"]: row for row in parse_result("order", answer)}
        elif not answer.startswith("invalid call:"):
            known.acts.append(call)
    return known


def _exchanges(conversation: Sequence[Message]) -> Iterator[tuple[ToolCall, str]]:
    """Calls with their answers; tools answer in the order in which they were called."""
    waiting: list[ToolCall] = []
    for message in conversation:
        if message.role == "assistant":
            waiting = list(message.tool_calls)
        elif message.role == "tool" and waiting:
            yield waiting.pop(0), message.content


def _act(step: Step, listed: dict[str, Row]) -> ToolCall | None:
    """The call that fulfils a step; None when the listing shows no such item."""
    row = listed.get(step.item)
    if row is None:
        return None
    if step.verb == "refund":
        name = "refund_order" if row["condition"] in REFUNDABLE else "decline_refund"
        return ToolCall(name=name, arguments={"item": step.item, "order": row["id"]})
    about = {"subject": step.item, "ticket": row["id"]}
    if step.verb == "set":
        return ToolCall(name="set_priority", arguments={**about, "level": step.value})
    if step.verb == "give":
        return ToolCall(name="assign_ticket", arguments={**about, "team": step.value})
    return ToolCall(name="close_ticket", arguments=about)


def _is_done(act: ToolCall, tried: Sequence[ToolCall]) -> bool:
    """Whether the last call that touched the same column of the same row was this one.

    A refused attempt counts too: repeating it would be refused again.
    """
    number = _number(act)
    same = [t for t in tried if t.name == act.name and _number(t) == number]
    return bool(same) and dict(same[-1].arguments) == dict(act.arguments)


def _number(act: ToolCall) -> object:
    return act.arguments.get("ticket", act.arguments.get("order"))


def _wrong_acts(act: ToolCall, step: Step, listed: dict[str, Row]) -> tuple[Message, ...]:
    """The right tool on each other open row, the right row with another value or tool, giving up."""
    number = _number(act)
    others = [item for item, row in listed.items() if row["id"] != number and row["status"] in ("open", "paid")]
    acts = [_act(Step(step.verb, item, step.value), listed) for item in others]
    slips = [Message("assistant", tool_calls=(other,)) for other in acts if other is not None]
    if act.name == "set_priority":
        slips.append(_call(act.name, **{**act.arguments, "level": _after(step.value, LEVELS)}))
    elif act.name == "assign_ticket":
        slips.append(_call(act.name, **{**act.arguments, "team": _after(step.value, TEAMS)}))
    elif act.name != "close_ticket":
        other_name = "decline_refund" if act.name == "refund_order" else "refund_order"
        slips.append(_call(other_name, **act.arguments))
    return (*slips, *_closing_instead(step, number), *_GIVE_UP)


def _needless_acts(asked: Request, listed: dict[str, Row]) -> tuple[Message, ...]:
    """The same change again, on rows that nobody asked about, and closing what was handled."""
    last = asked.steps[-1]
    names = {step.item for step in asked.steps}
    others = [item for item, row in listed.items() if item not in names and row["status"] in ("open", "paid")]
    acts = [_act(Step(last.verb, item, last.value), listed) for item in others]
    needless = [Message("assistant", tool_calls=(act,)) for act in acts if act is not None]
    return (*needless, *_closing_instead(last, listed[last.item]["id"] if last.item in listed else None))


def _closing_instead(step: Step, number: object) -> list[Message]:
    return (
        [_call("close_ticket", subject=step.item, ticket=number)]
        if step.verb in ("set", "give") and number is not None
        else []
    )


def _call(name: str, /, **arguments: object) -> Message:
    return Message("assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))


def _same_name(said: object, name: str) -> bool:
    return isinstance(said, str) and " ".join(said.lower().split()) == name


def _other_name(name: str) -> str:
    first, last = name.split()
    return f"{first} {_after(last, LAST_NAMES)}"


def _after(value: str, values: Sequence[str]) -> str:
    return values[(values.index(value) + 1) % len(values)]
