"""The scripted expert of CodeRepair: look, write what is wrong, run, and done when the examples pass.

Looking is reading the file in the full form, and in the compact form running, which names the first wrong line.

It works from the task's solution but acts through the tools alone. Like somebody without the solution it
finds a slip of its own when a run fails, and then writes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from palaestra.envs._experts import Decision
from palaestra.types import JsonObject, Message, Task, ToolCall

_MISTAKEN: Mapping[str, str] = {
    "+": "-",
    "-": "+",
    "*": "+",
    "%": "*",
    "<": ">",
    ">": "<",
    "==": ">",
    "max": "min",
    "min": "max",
    "sum": "len",
    "len": "sum",
    "x": "y",
    "y": "x",
}


@dataclass
class _Progress:
    """What a conversation has come to: what stands where, and what was done since the last run."""

    code: dict[int, str]
    has_looked: bool = False
    has_passed: bool = False
    written: set[int] = field(default_factory=set)


class RepairExpert:
    """See `Expert`. The full form is the compact one with the whole file as its only line."""

    def __init__(self, max_turns: int) -> None:
        self._max_turns = max_turns

    def decide(self, task: Task, conversation: Sequence[Message]) -> Decision:
        """Look first; write a wrong line before every run; done when a run has passed."""
        solution = _solution(task.data)
        progress = _progress(task.data, conversation)
        if not progress.has_looked:
            return Decision(_call("run" if task.data["form"] == "compact" else "read"), (_call("done"),))
        wrong = [number for number in solution if not _is_same(progress.code[number], solution[number])]
        to_write = [number for number in wrong if number not in progress.written]
        if to_write and not progress.written:
            best, *slips = _writes(task.data, to_write[0])
            return Decision(best, (*slips, _call("done")))
        spoils = _writes(task.data, min(progress.written, default=min(solution)))[1:3]
        num_turns = sum(message.role == "assistant" for message in conversation)
        # a run as the last turn would leave none to say done
        if progress.has_passed or num_turns == self._max_turns - 1:
            return Decision(_call("done"), (_call("run"), *spoils))
        return Decision(_call("run"), (_call("done"), *spoils))


def _progress(data: JsonObject, conversation: Sequence[Message]) -> _Progress:
    progress = _Progress(_broken(data))
    calls = [call for message in conversation if message.role == "assistant" for call in message.tool_calls]
    answers = [message.content for message in conversation if message.role == "tool"]
    for call, answer in zip(calls, answers, strict=False):
        if call.name == "read":
            progress.has_looked = True
        elif call.name == "run" and not call.arguments.get("command"):
            progress.has_looked = True
            progress.has_passed = answer == "pass" or answer.startswith("all ")
            progress.written.clear()
        elif call.name == "write" and answer.startswith(("ok", "wrote ")):
            number = int(call.arguments.get("line", 0))
            progress.code[number] = str(call.arguments.get("text", call.arguments.get("content")))
            progress.has_passed = False
            progress.written.add(number)
    return progress


def _solution(data: JsonObject) -> dict[int, str]:
    if data["form"] == "compact":
        return dict(enumerate(data["solution"], start=1))
    return {0: data["solution"]}


def _broken(data: JsonObject) -> dict[int, str]:
    return dict(enumerate(data["lines"], start=1)) if data["form"] == "compact" else {0: data["source"]}


def _writes(data: JsonObject, number: int) -> list[Message]:
    """The right write of line `number`, then wrong ones: of the same line, and of the next."""
    if data["form"] == "full":
        return [_call("write", content=data["solution"]), _call("write", content=data["source"])]
    codes: Sequence[str] = data["solution"]
    other = number % len(codes) + 1
    slips = [(number, text) for text in _mistaken_texts(codes[number - 1])]
    slips += [(other, text) for text in _mistaken_texts(codes[other - 1])[:1]]
    return [_call("write", line=line, text=text) for line, text in [(number, codes[number - 1]), *slips]]


def _mistaken_texts(code: str) -> list[str]:
    """The line with one word mistaken, for every word that can be."""
    words = code.split()
    found = []
    for position, word in enumerate(words):
        other = str(int(word) + 1) if word.isdecimal() else _MISTAKEN.get(word)
        if other is not None:
            found.append(" ".join([*words[:position], other, *words[position + 1 :]]))
    return found


def _is_same(one: str, two: str) -> bool:
    return "".join(one.split()) == "".join(two.split()) if "\n" not in two else one == two


def _call(name: str, **arguments: object) -> Message:
    return Message("assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))
