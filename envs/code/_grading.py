"""Runs a function on the calls of its tests in a sandbox, and compares what it gave on the host.

Covers: printed results, early exits, patched modules, planted files, results that claim to equal anything,
and results for more calls than were asked. None of them help, because only JSON text leaves the box, the
expected text never enters it, and answer k counts for call k alone.
Does not cover: code that really computes the right values, however it does so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from palaestra.envs.code._tests import Tests, canonical
from palaestra.sandboxes import Ended, ExecResult, Sandbox

_MAX_RESULT = 1000
"""Characters of one result, so that all answers stay below the box's output limit."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")

# Answers leave on a copy of the output, one JSON line for each call, as soon as they are known; what the
# tested code prints goes to the error output.
_DRIVER = f"""
import copy, json, os, sys, types
request = json.loads(sys.stdin.read())
answers = os.dup(1)
os.dup2(2, 1)
def answer(value):
    os.write(answers, (json.dumps(value) + "\\n").encode())
def say(error):
    answer({{"error": f"{{type(error).__name__}}: {{error}}"[:200]}})
module = sys.modules["solution"] = types.ModuleType("solution")
try:
    exec(compile(request["source"], "solution.py", "exec"), module.__dict__)
    function = getattr(module, request["function"])
except BaseException as error:
    for call in request["calls"]:
        say(error)
    os._exit(0)
for call in request["calls"]:
    try:
        value = function(*call)
        if len(json.dumps(value)) > {_MAX_RESULT}:
            raise ValueError("the result is too long")
    except BaseException as error:
        say(error)
    else:
        answer([value])
sys.stdout.flush()
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call gave: canonical JSON text, or why there is none."""

    text: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Grade:
    """The answers to all calls of some tests, and how the execution ended."""

    tests: Tests
    answers: tuple[Answer, ...]
    ended: Ended
    printed: str
    """What the tested code wrote to its output and error output."""

    @property
    def passed(self) -> tuple[bool, ...]:
        """For each test whether it passed."""
        pairs = zip(self.answers, self.tests.expected, strict=True)
        return tuple(not answer.error and answer.text == expected for answer, expected in pairs)

    @property
    def is_passed(self) -> bool:
        """Every test passed, and there was one."""
        return bool(self.passed) and all(self.passed)

    @property
    def share(self) -> float:
        """Share of the tests that passed, in [0, 1]."""
        return sum(self.passed) / max(1, len(self.passed))


async def grade(box: Sandbox, source: str, tests: Tests, *, wall_s: float) -> Grade:
    """Run `source` on all calls of `tests` in one execution of at most `wall_s` seconds.

    Whatever the code does is a grade; raises `SandboxError` when the box itself fails.
    """
    request = {"source": source, "function": tests.function, "calls": tests.calls}
    result = await box.run_python(_DRIVER, stdin=json.dumps(request).encode(), wall_s=wall_s)
    return Grade(tests, _read_answers(result, len(tests)), result.ended, mask(result.stderr))


def first_wrong_line(steps: Grade, num_lines: int) -> int:
    """The line, from 1, after which a traced value is first wrong in any call; the last line when none is.

    `steps` grades a function that lists the value after each line but the last. Where it gave no list of that
    length, as after a syntax error, line 1 is as good a place to look as any.
    """
    wrong = num_lines
    for answer, expected in zip(steps.answers, steps.tests.expected, strict=True):
        seen, right = _values(answer.text), json.loads(expected)
        if seen is None or len(seen) != len(right):
            return 1
        differing = [line for line, pair in enumerate(zip(seen, right, strict=True), start=1) if pair[0] != pair[1]]
        wrong = min([wrong, *differing])
    return wrong


def _values(text: str) -> list[object] | None:
    value = json.loads(text) if text else None
    return value if isinstance(value, list) else None


def mask(output: bytes) -> str:
    """Output as text in which memory addresses, which differ between runs, are hidden."""
    return _ADDRESS.sub("0x...", output.decode(errors="replace"))


def _read_answers(result: ExecResult, count: int) -> tuple[Answer, ...]:
    lines = result.stdout.split(b"\n")[:-1]
    if len(lines) > count:
        return (Answer(error="the code wrote answers of its own"),) * count
    missing = Answer(error=_explain(result))
    return tuple(_read_answer(lines[k]) if k < len(lines) else missing for k in range(count))


def _read_answer(line: bytes) -> Answer:
    try:
        value = json.loads(line)
        text = canonical(value[0]) if isinstance(value, list) and len(value) == 1 else ""
    except (ValueError, RecursionError):  # also what the code wrote in place of an answer
        return Answer(error="the answer is not JSON")
    if isinstance(value, dict) and isinstance(value.get("error"), str):
        return Answer(error=_ADDRESS.sub("0x...", value["error"]))
    return Answer(text=text) if text else Answer(error="the answer is not JSON")


def _explain(result: ExecResult) -> str:
    match result.ended:
        case Ended.WALL_TIMEOUT | Ended.CPU_TIMEOUT:
            return "the time limit was reached"
        case Ended.OOM:
            return "the memory limit was reached"
        case Ended.DISK:
            return "the disk limit was reached"
        case Ended.OUTPUT_LIMIT:
            return "the output limit was reached"
        case Ended.SANDBOX_KILLED:
            return "the sandbox was destroyed by the code"
        case Ended.SIGNAL | Ended.EXIT:
            return "the program ended before it gave an answer"
