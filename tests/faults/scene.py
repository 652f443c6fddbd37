"""The environment that the hit runs play, and the gates at which they are held; imported by the command itself.

Files in the folder that `PALAESTRA_FAULTS` names say what goes wrong: tests make and remove them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from palaestra.envs import Env, EnvLimits, register
from palaestra.types import JsonObject, Message, Observation, Split, Task

SCENE, OTHER = "test/Scene-v0", "test/Other-v0"
_LOOK_S = 0.01


class ScenePaths:
    """`gate` names what is held, `open` lets it go, `block` blocks the loop, `hang` hangs a part, `jump` moves the
    clock by as many seconds as it says."""

    def __init__(self, folder: Path) -> None:
        self.gate, self.open, self.block, self.hang, self.jump = (
            folder / name for name in ("gate", "open", "block", "hang", "jump")
        )


class Scene(Env):
    """One answer and it is over; its length is the reward."""

    num_tasks: Mapping[Split, int] = {"train": 300, "validation": 30, "test": 30}
    default_limits = EnvLimits(max_turns=1, tool_s=600.0, episode_s=600.0)
    env_id = SCENE

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        return {"number": index * 3 + ("train", "validation", "test").index(split)}

    async def begin(self, task: Task) -> Observation:
        paths = _paths()
        while paths.hang.exists():
            await asyncio.sleep(_LOOK_S)
        while paths.block.exists():
            time.sleep(_LOOK_S)  # noqa: ASYNC251  # the fault
        return (Message("user", f"say {task.data['number']}"),)

    async def verify(self) -> Mapping[str, float]:
        return {"success": len(self.turns[-1].action.content) % 5 / 4 if self.turns else 0.0}


class Other(Scene):
    """The same under another name."""

    env_id = OTHER


def _paths() -> ScenePaths:
    return ScenePaths(Path(os.environ["PALAESTRA_FAULTS"]))


def _hold(owner: Any, name: str) -> None:
    """Make a method say that it was reached, and wait there once until it may go on."""
    method: Callable[..., Awaitable[Any]] = getattr(owner, name)
    is_bound = hasattr(method, "__self__")
    reached: list[str] = []

    @functools.wraps(method)
    async def held(*args: Any, **kwargs: Any) -> Any:
        if not reached:
            reached.append(name)
            print(f"gate: {name}", file=sys.stderr, flush=True)
            while not _paths().open.exists():
                await asyncio.sleep(_LOOK_S)
        return await method(*args, **kwargs)

    setattr(owner, name, staticmethod(held) if is_bound else held)


def _install() -> None:
    paths = _paths()
    if not paths.gate.exists():
        return
    name = paths.gate.read_text()
    if name == "import":
        print("gate: import", file=sys.stderr, flush=True)
        while not paths.open.exists():
            time.sleep(_LOOK_S)
    elif name == "generate":
        from palaestra.agents.engines.transformers import TransformersEngine

        _hold(TransformersEngine, name)
    else:
        from palaestra.trainer.learner import LocalLearner

        _hold(LocalLearner, name)


def _jump() -> None:
    """Let the wall clock, and nothing else, jump as the test says."""
    real = time.time

    def jumped() -> float:
        path = _paths().jump
        return real() + (float(path.read_text() or 0) if path.exists() else 0.0)

    time.time = jumped


for _env_id, _name in ((SCENE, "Scene"), (OTHER, "Other")):
    register(_env_id, f"tests.faults.scene:{_name}", family="toy", summary="say something")
if "PALAESTRA_FAULTS" in os.environ:
    _install()
    _jump()
