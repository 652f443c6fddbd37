"""CodeRepair: a broken Python function, a sandbox to try it in, hidden tests that say when it is repaired.

Invariant: success is what hidden tests in the sandbox say of the code that the agent left, and nothing else.
The compact form edits single lines of a function that a short spec describes; the full form edits files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from palaestra.envs._base import DEFAULT_REWARD, Env, EnvLimits
from palaestra.envs._experts import Expert
from palaestra.envs._tools import ToolError, tool
from palaestra.envs.code._compact_tasks import make_compact_data
from palaestra.envs.code._expert import RepairExpert
from palaestra.envs.code._full_tasks import SOLUTION_FILE, make_full_data
from palaestra.envs.code._grading import Grade, first_wrong_line, mask
from palaestra.envs.code._phrases import number_lines, source_of, trace_source_of
from palaestra.envs.code._tests import Tests
from palaestra.envs.code._workspace import Workspace
from palaestra.errors import TaskError
from palaestra.resources import Resources
from palaestra.rewards import RewardStack
from palaestra.sandboxes import ExecResult
from palaestra.types import Form, JsonObject, Message, Observation, Split, Task

_LIMITS: Mapping[Form, EnvLimits] = {
    "compact": EnvLimits(max_turns=6),
    "full": EnvLimits(max_turns=12, tool_s=30.0, episode_s=600.0),
}
_TESTS_WALL_S = 2.0
_COMMAND_WALL_S = 10.0
_MAX_LINE = 200
_MAX_SHOWN = 4000
_INSTRUCTIONS = f"""\
You repair Python code. The file {SOLUTION_FILE} in /workspace has a function that does not do what its \
docstring says. Find what is wrong and repair it, keeping the function's name and parameters. Use the tools: \
read a file, write a file, and run, which without a command tries the function on examples and shows the first \
one that fails. When you are sure that it is right, call done: hidden tests then decide. Only the standard \
library is there, and no network."""


class CodeRepair(Env):
    """Repair a broken Python function until its hidden tests pass in a sandbox."""

    env_id = "palaestra/CodeRepair-v0"
    num_tasks: Mapping[Split, int] = {"train": 10_000, "validation": 1_000, "test": 1_000}

    def __init__(
        self,
        *,
        sandbox: str = "jail",
        num_ready: int = 4,
        form: Form = "full",
        split: Split = "train",
        reward: RewardStack = DEFAULT_REWARD,
        limits: EnvLimits | Mapping[str, Any] | None = None,
        resources: Resources | None = None,
        render_mode: str | None = None,
    ) -> None:
        """`sandbox` names the back end; `num_ready` boxes are kept ready for all episodes that share resources."""
        super().__init__(
            form=form,
            split=split,
            reward=reward,
            limits=_LIMITS.get(form, self.default_limits).over(limits),
            resources=resources,
            render_mode=render_mode,
        )
        self._sandbox = sandbox
        self._num_ready = num_ready
        self._lines: list[str] = []
        self._workspace_or_none: Workspace | None = None

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        """A broken function, its solution, its tests; what they are is decided by split, index and form."""
        return make_compact_data(split, index) if self.form == "compact" else make_full_data(split, index)

    async def begin(self, task: Task) -> Observation:
        """The spec alone in the compact form; instructions and the function's purpose in the full form."""
        data = task.data
        if data.get("form") != self.form:
            raise TaskError(f"task {task.id} has form {data.get('form')!r}, but the environment has {self.form!r}")
        files = {} if self.form == "compact" else {SOLUTION_FILE: data["source"]}
        self._workspace_or_none = Workspace(self.resources, self._sandbox, self._num_ready, files)
        if self.form == "compact":
            self._lines = list(data["lines"])
            return (Message("user", f"fix {data['spec']}"),)
        return Message("system", _INSTRUCTIONS), Message("user", data["request"])

    async def verify(self) -> Mapping[str, float]:
        """`success` when every hidden test passed, and `tests_passed`, their share."""
        source = await self._final_source()
        if source is None:
            return {"success": 0.0, "tests_passed": 0.0, "unsafe": 0.0}
        result = await self._grade(source, "hidden")
        return {"success": float(result.is_passed), "tests_passed": result.share, "unsafe": 0.0}

    async def end(self) -> None:
        """Give the sandbox back."""
        if self._workspace_or_none is not None:
            await self._workspace_or_none.aclose()
            self._workspace_or_none = None

    def expert(self) -> Expert:
        """Plays either form from the task's solution."""
        return RepairExpert(self.limits.max_turns)

    @tool(form="compact", name="read")
    async def read_lines(self) -> str:
        """Show the numbered lines of the code."""
        return number_lines(self._lines)

    @tool(form="compact", name="write")
    async def write_line(self, line: int, text: str) -> str:
        """Replace one line of the code."""
        if not 1 <= line <= len(self._lines):
            raise ToolError(f"no line {line}")
        if len(text) > _MAX_LINE or "\n" in text or "\r" in text:
            raise ToolError("not one line")
        self._lines[line - 1] = text
        return "ok"

    @tool(form="compact", name="run")
    async def run_tests(self) -> str:
        """Try the code on examples: pass, or fail and the first line after which a value is wrong."""
        if (await self._grade(source_of(self._lines), "visible")).is_passed:
            return "pass"
        steps = await self._grade(trace_source_of(self._lines), "steps")
        return f"fail {first_wrong_line(steps, len(self._lines))}"

    @tool(form="full", name="read")
    async def read_file(self, path: str = SOLUTION_FILE) -> str:
        """Show a file of /workspace."""
        try:
            return await self._workspace.read(path)
        except (OSError, ValueError) as error:
            raise ToolError(f"cannot read {path!r}: {_reason(error)}") from error

    @tool(form="full", name="write")
    async def write_file(self, content: str, path: str = SOLUTION_FILE) -> str:
        """Create or replace a file of /workspace with the given content."""
        try:
            await self._workspace.write(path, content)
        except (OSError, ValueError) as error:
            raise ToolError(f"cannot write {path!r}: {_reason(error)}") from error
        return f"wrote {len(content.splitlines())} lines to {path}"

    @tool(form="full", name="run")
    async def run_command(self, command: str = "") -> str:
        """Run a shell command in /workspace; without one, try the function on examples."""
        if command:
            wall_s = min(_COMMAND_WALL_S, self.limits.tool_s / 2)
            return _describe_command(await self._workspace.shell(command, wall_s=wall_s))
        source = await self._final_source()
        if source is None:
            raise ToolError(f"cannot read {SOLUTION_FILE}")
        return _describe_grade(await self._grade(source, "visible"))

    @tool
    async def done(self) -> str:
        """Say that the code is repaired; hidden tests then decide."""
        self.finish()
        return "done"

    @property
    def _workspace(self) -> Workspace:
        if self._workspace_or_none is None:
            raise TaskError("no episode is running: call reset() first")
        return self._workspace_or_none

    async def _final_source(self) -> str | None:
        """The code as the agent left it; None when there is no such file any more."""
        if self.form == "compact":
            return source_of(self._lines)
        try:
            return await self._workspace.read(SOLUTION_FILE)
        except OSError:
            return None

    async def _grade(self, source: str, which: str) -> Grade:
        # half of a tool call, because a call that is cut short costs the box
        wall_s = min(_TESTS_WALL_S, self.limits.tool_s / 2)
        return await self._workspace.grade(source, Tests.from_json(self.task.data[which]), wall_s=wall_s)


def _describe_grade(result: Grade) -> str:
    tests = result.tests
    if result.is_passed:
        return f"all {len(tests)} examples pass"
    failed = result.passed.index(False)
    answer = result.answers[failed]
    gave = f"failed: {answer.error}" if answer.error else f"gave {answer.text}"
    text = f"{sum(result.passed)} of {len(tests)} examples pass; {tests.describe_call(failed)} {gave}"
    text += f", expected {tests.expected[failed]}"
    return f"{text}\nprinted:\n{_shorten(result.printed)}" if result.printed else text


def _describe_command(result: ExecResult) -> str:
    how = f"exit code {result.exit_code}" if result.exit_code is not None else f"ended by {result.ended}"
    return "\n".join(part for part in (how, _shorten(mask(result.stdout)), _shorten(mask(result.stderr))) if part)


def _shorten(text: str) -> str:
    text = text.rstrip("\n")
    half = _MAX_SHOWN // 2
    return text if len(text) <= _MAX_SHOWN else f"{text[:half]}\n[...]\n{text[-half:]}"


def _reason(error: OSError | ValueError) -> str:
    return cast(str, getattr(error, "strerror", None)) or str(error)
