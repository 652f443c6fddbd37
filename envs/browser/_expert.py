"""The scripted expert of MiniWoB: reads the conversation, follows its page's plan, and knows how to slip.

Invariant: `best` depends on the conversation and the page's name alone; slips are calls that the page takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from palaestra.envs._experts import Decision
from palaestra.envs.browser._plans import COMPACT_PLANS, Plan, Step
from palaestra.envs.browser._plans_full import FULL_PLANS
from palaestra.envs.browser._view import Control, View, read
from palaestra.errors import TaskError
from palaestra.types import Message, Task, ToolCall

_PLANS = {**COMPACT_PLANS, **FULL_PLANS}
_MAX_SLIPS = 3


class MiniWoBExpert:
    """Plays every supported page in both forms."""

    def decide(self, task: Task, conversation: Sequence[Message]) -> Decision:
        """The next call; raises `TaskError` for a page without a plan."""
        view = read(conversation)
        steps = plan_of(task.data["page"])(view)
        if not steps:
            return Decision(Message("assistant", "I cannot find it."))
        slips = list(dict.fromkeys(step for step in _slips(view, steps) if step != steps[0]))
        return Decision(_message(view, steps[0]), tuple(_message(view, slip) for slip in slips[:_MAX_SLIPS]))


def plan_of(page: str) -> Plan:
    """The plan of a page; raises `TaskError` when it has none."""
    if page not in _PLANS:
        raise TaskError(f"the expert has no plan for the page {page!r}")
    return _PLANS[page]


def _message(view: View, step: Step) -> Message:
    control = next(control for control in view.controls if control.ref == step.ref)
    arguments: dict[str, object] = {"element": f"{control.role} {control.name}".strip(), "ref": step.ref}
    if step.kind == "type":
        arguments["text"] = step.text
    if step.kind == "select":
        arguments["option"] = step.text
    return Message("assistant", tool_calls=(ToolCall(name=step.kind, arguments=arguments),))


def _slips(view: View, steps: Sequence[Step]) -> list[Step]:
    """Submitting too early, a wrong text or option; where there is neither, a wrong control."""
    best, last = steps[0], steps[-1]
    slips = [last] if len(steps) > 1 else []
    slips += _wrong_values(view, steps if len(steps) > 1 else _entered(view))
    return slips or [Step("click", one.ref) for one in _lookalikes(view, best)]


def _wrong_values(view: View, steps: Sequence[Step]) -> list[Step]:
    """The first step that enters something, with something else."""
    first = next((step for step in steps if step.kind != "click"), None)
    if first is None:
        return []
    if first.kind == "select":
        options = next(one.options for one in view.controls if one.ref == first.ref)
        return [Step("select", first.ref, option) for option in options if option not in ("", first.text)][:1]
    texts = [step.text for step in steps if step.kind == "type" and step.text != first.text]
    texts += [one.name.split()[-1] for one in view.controls if one.name and one.ref != first.ref]
    return [Step("type", first.ref, text) for text in texts[:1]]


def _entered(view: View) -> list[Step]:
    """What was entered so far, as steps, to be spoilt just before the end."""
    typed = [Step("type", ref, text) for ref, text in view.typed.items()]
    return typed + [Step("select", ref, options[-1]) for ref, options in view.chosen.items()]


def _lookalikes(view: View, best: Step) -> list[Control]:
    """Other controls: links where one was to be opened first, then the same role, then what can be ticked."""
    role = next((one.role for one in view.controls if one.ref == best.ref), "")
    for roles in (("link",) if role in ("tab", "folder") else (), (role,), ("check", "radio", "link", "tab")):
        others = [one for one in view.of(*roles) if one.ref != best.ref]
        if others:
            return others
    return []
