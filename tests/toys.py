"""Small real programs for tests: an environment without parts, an engine and a learner without weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from palaestra.agents import Completion, EngineStats, Sampling
from palaestra.envs import Decision, Env, EnvLimits, Expert, ToolError, register, tool
from palaestra.errors import SandboxError
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import Published, StepReport
from palaestra.types import JsonObject, Message, Observation, Split, Task, ToolCall

WORDS = ("ant", "bee", "cat", "dog", "eel", "fox")


class Echo(Env):
    """Say the word, then stop. Options make it fail in every way an environment can."""

    num_tasks: Mapping[Split, int] = {"train": 600, "validation": 60, "test": 60}
    default_limits = EnvLimits(max_turns=4, tool_s=0.2, episode_s=5.0)
    env_id = "test/Echo-v0"
    num_open: ClassVar[int] = 0

    def __init__(self, *, fault: str = "", **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.fault = fault

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        offset = ("train", "validation", "test").index(split)
        return {"word": WORDS[(index + offset) % len(WORDS)], "index": index, "split": split}

    async def begin(self, task: Task) -> Observation:
        Echo.num_open += 1
        if self.fault == "begin":
            raise SandboxError("no box to be had")
        self._said = ""
        return (Message("user", f"say {task.data['word']}"),)

    async def verify(self) -> Mapping[str, float]:
        if self.fault == "verify":
            raise SandboxError("the judge is gone")
        return {"success": float(self._said == self.task.data["word"])}

    async def end(self) -> None:
        Echo.num_open -= 1
        if self.fault == "end":
            raise SandboxError("cannot clean up")

    @tool
    async def say(self, word: str) -> str:
        """Say a word."""
        if self.fault == "step":
            raise SandboxError("the box died")
        if self.fault == "brief":
            await asyncio.sleep(0.001)
        if self.fault == "slow":
            await asyncio.sleep(60)
        if word == "mute":
            raise ToolError("cannot say that")
        self._said = word
        return f"said {word}"

    @tool
    async def stop(self) -> str:
        """Stop speaking."""
        self.finish()
        return "ok"

    def expert(self) -> Expert:
        return EchoExpert()


class EchoExpert:
    """Says what was asked for, then stops."""

    def decide(self, task: Task, conversation: Sequence[Message]) -> Decision:
        has_spoken = any(message.role == "tool" for message in conversation)
        if has_spoken:
            return Decision(call("stop"))
        return Decision(call("say", word=task.data["word"]), (call("say", word="wrong"),))


def call(name: str, **arguments: object) -> Message:
    """An assistant message with one tool call."""
    return Message("assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))


def pass_time(seconds: float) -> None:
    """Let time pass for the timers of the running loop, at once and for nothing else."""
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + seconds  # type: ignore[method-assign]


def register_echo() -> None:
    """Make `test/Echo-v0` known."""
    register("test/Echo-v0", "tests.toys:Echo", family="toy", summary="say the word")


Chooser = Callable[[Sequence[int], int], list[int]]
"""(prompt, seed) -> the ids of the reply."""


class ToyEngine:
    """Answers with what `choose` says; every token carries the version whose weights were loaded last."""

    max_model_len = 512

    def __init__(self, choose: Chooser, *, delay_s: float = 0.0) -> None:
        self.choose = choose
        self.delay_s = delay_s
        self.version = -1
        self.loaded: list[int] = []
        self.wrong_by = 0.0
        self.jitter: np.random.Generator | None = None
        self._tokens = self._requests = 0

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        begun_with = self.version
        await asyncio.sleep(self.delay_s if self.jitter is None else float(self.jitter.random()) / 100)
        ids = self.choose(prompt, seed or 0)[: sampling.max_tokens]
        versions = np.full(len(ids), self.version, np.int32)
        versions[0] = begun_with
        self._tokens += len(ids)
        self._requests += 1
        return Completion(
            ids=np.asarray(ids, np.int32),
            logprobs=np.full(len(ids), -0.5, np.float32),
            versions=versions,
            stop_reason="stop",
        )

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [np.full(len(ids) - 1, -1.0 - self.wrong_by, np.float32) for ids in sequences]

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        assert (folder / "weights").read_text() == str(version)
        self.version = version
        self.loaded.append(version)

    async def stats(self) -> EngineStats:
        busy_s = self._requests / 1000
        return EngineStats(tokens=self._tokens, requests=self._requests, busy_s=busy_s, version=self.version)

    async def aclose(self) -> None:
        pass


class ToyLearner:
    """Counts steps and remembers the rows of each."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.version = 0
        self.delay_s = delay_s
        self.batches: list[list[TrainRow]] = []

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        await asyncio.sleep(self.delay_s)
        self.batches.append(list(rows))
        self.version += 1
        return StepReport(metrics={"loss": 0.0}, version=self.version, seconds=self.delay_s)

    async def publish(self, folder: Path) -> Published:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(str(self.version))
        return Published(version=self.version, checksum="")

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [np.full(len(ids) - 1, -1.0, np.float32) for ids in sequences]

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "version").write_text(str(self.version))

    async def load(self, folder: Path) -> None:
        self.version = int((folder / "version").read_text())

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    async def aclose(self) -> None:
        pass
