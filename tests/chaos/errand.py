"""What the killed runs play: walk to a number in several turns, with waits, failures and rewards that seeds decide.

Invariant: an episode is a function of its task, its seed and what the agent says; only its wall clock differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from palaestra.envs import Decision, Env, EnvLimits, EnvSuite, Expert, ToolError, register, tool
from palaestra.errors import SandboxError
from palaestra.types import JsonObject, Message, Observation, Split, Task
from tests.toys import call

ERRAND, STROLL = "test/Errand-v0", "test/Stroll-v0"
_FARTHEST = 9
_FAILURE_RATE = 0.02
_LONGEST_WAIT_S = 0.02


class Errand(Env):
    """Walk to a number, then rest there. Now and then the ground gives way, which is nobody's reward."""

    num_tasks: Mapping[Split, int] = {"train": 300, "validation": 30, "test": 30}
    default_limits = EnvLimits(max_turns=5, tool_s=5.0, episode_s=60.0)
    env_id = ERRAND

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        offset = ("train", "validation", "test").index(split)
        return {"goal": 1 + index % _FARTHEST, "number": index * 3 + offset}

    async def begin(self, task: Task) -> Observation:
        await self._wait()
        if self.np_random.random() < _FAILURE_RATE:
            raise SandboxError("the ground gave way")
        self._place = 0
        return (Message("user", f"go to {task.data['goal']}"),)

    async def verify(self) -> Mapping[str, float]:
        await self._wait()
        distance = abs(self._place - self.task.data["goal"])
        return {"success": 1.0 / (1.0 + distance)}

    @tool
    async def walk(self, steps: int) -> str:
        """Walk some steps on."""
        await self._wait()
        if steps > _FARTHEST:
            raise ToolError("too far")
        self._place += steps
        return f"at {self._place}"

    @tool
    async def rest(self) -> str:
        """Rest, which ends the errand."""
        await self._wait()
        self.finish()
        return "done"

    def expert(self) -> Expert:
        return Walker()

    async def _wait(self) -> None:
        await asyncio.sleep(self.np_random.uniform(0.0, _LONGEST_WAIT_S))


class Stroll(Errand):
    """The same under another name, for suites that change."""

    env_id = STROLL


class Walker:
    """Walks up to four steps at a time, and slips to other distances or an early rest."""

    def decide(self, task: Task, conversation: Sequence[Message]) -> Decision:
        places = [int(m.content[3:]) for m in conversation if m.role == "tool" and m.content.startswith("at ")]
        left = task.data["goal"] - (places[-1] if places else 0)
        slips = (call("rest"), *(call("walk", steps=steps) for steps in range(1, _FARTHEST)))
        return Decision(call("walk", steps=min(left, 4)) if left > 0 else call("rest"), slips)


def errands() -> EnvSuite:
    """The suite that runs are begun with."""
    return EnvSuite({ERRAND: 1.0})


register(ERRAND, "tests.chaos.errand:Errand", family="toy", summary="walk to a number")
register(STROLL, "tests.chaos.errand:Stroll", family="toy", summary="walk to a number as well")
