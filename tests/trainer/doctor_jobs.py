"""Jobs for the doctor's tests: a model folder that says how much it reads, and an environment that leaks on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, ClassVar

from palaestra.envs import Env, EnvLimits, Expert, register, tool
from palaestra.sandboxes.leases import Record, process_handle
from palaestra.trainer.doctor import Subject
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.job import Job
from palaestra.types import JsonObject, Message, Observation, Split, Task
from tests.toys import EchoExpert, register_echo

CPU = Machine(num_cores=2, free_mb=8000)
GPU = Machine(num_cores=2, free_mb=8000, gpu_free_mb=70_000, gpu_total_mb=80_000)

ECHO, LEAKY = "test/Echo-v0", "test/Leaky-v0"
_SESSION = os.environ.setdefault("PALAESTRA_TESTS_PLANT", str(os.getpid()))  # the probe's processes inherit it
PLANTED = f"/tmp/palaestra-planted-{_SESSION}-"
"""Where files are planted outside the probe's own folder, and under this name in /dev/shm; no neighbour takes them."""


class Leaky(Env):
    """Say the word. `leak` names what each episode leaves behind, `reward_for` who is paid."""

    num_tasks: Mapping[Split, int] = {"train": 600, "validation": 60, "test": 60}
    default_limits = EnvLimits(max_turns=4, tool_s=0.5, episode_s=5.0, setup_s=30.0)
    env_id = LEAKY
    kept: ClassVar[list[object]] = []

    def __init__(
        self, *, leak: str = "", is_always_solved: bool = False, has_expert: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.leak = leak
        if leak == "no tasks":
            self.num_tasks = {**self.num_tasks, "train": 0}
        self.is_always_solved = is_always_solved
        self.has_expert = has_expert

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        offset = ("train", "validation", "test").index(split)
        return {"word": ("ant", "bee", "cat")[(index + offset) % 3], "index": index, "split": split}

    async def begin(self, task: Task) -> Observation:
        self._said = ""
        self._is_judged = False
        if self.leak == "early":
            descriptor = os.open("/dev/null", os.O_RDONLY)
            await asyncio.sleep(0.02)  # a cut here leaves it open
            os.close(descriptor)
        if self.leak == "stuck":
            await asyncio.Event().wait()
        if self.leak == "slow":
            await asyncio.sleep(0.4)
        if self.leak == "some" and task.data["index"] % 5 == 0:
            raise RuntimeError("the shop is closed on Sundays")
        if self.leak == "broken":
            raise RuntimeError("the shop is closed")
        self._leave_something()
        return (Message("user", f"say {task.data['word']}"),)

    def _leave_something(self) -> None:
        match self.leak:
            case "descriptors":
                os.open("/dev/null", os.O_RDONLY)
            case "processes":
                self.kept.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True))
            case "orphans":
                subprocess.Popen(["sleep", "600"], start_new_session=True)
            case "files":
                tempfile.mkdtemp()
            case "nested":
                folder = Path(tempfile.gettempdir(), "cache", "deep")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(time.monotonic_ns())).write_text("x")
            case "absolute":
                Path(f"{PLANTED}{time.monotonic_ns()}").write_text("x")
            case "childs":
                subprocess.run(["touch", f"{PLANTED}{time.monotonic_ns()}"], check=True)
            case "shared":
                shared_memory.SharedMemory(f"{Path(PLANTED).name}{time.monotonic_ns()}", create=True, size=64).close()
            case "threads":
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            case "leases":
                lease_id = f"doctor-test-{_SESSION}-{os.getpid()}-{len(self.kept)}"
                handle = process_handle(os.getpid())
                self.kept.append(
                    Record.write(lease_id=lease_id, backend="toy", label="test", handle=handle, lifetime_s=60.0)
                )
            case "crash":
                os._exit(3)
            case "blocking":
                time.sleep(600)

    async def verify(self) -> Mapping[str, float]:
        self._is_judged = True
        if self.leak == "crash unsaid" and not self._said:
            os._exit(3)
        is_solved = self.is_always_solved or self._said == self.task.data["word"]
        if self.leak == "success" and is_solved:
            os.open("/dev/null", os.O_RDONLY)
        return {"success": float(is_solved)}

    async def end(self) -> None:
        if self.leak == "failure" and not self._is_judged:
            os.open("/dev/null", os.O_RDONLY)

    @tool
    async def say(self, word: str) -> str:
        """Say a word."""
        self._said = word
        return f"said {word}"

    @tool
    async def stop(self) -> str:
        """Stop speaking."""
        self.finish()
        return "ok"

    def expert(self) -> Expert:
        if self.leak == "no call":
            raise RuntimeError("nobody knows the way")
        return EchoExpert() if self.has_expert else super().expert()


def register_toys() -> None:
    """Make both environments known."""
    register_echo()
    register(LEAKY, "tests.trainer.doctor_jobs:Leaky", family="toy", summary="say the word, leave something")


def make_model_folder(folder: Path, *, positions: int = 8192, is_ours: bool = False) -> str:
    """A folder that looks like a model to whoever only reads its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    if is_ours:
        marker = {"palaestra": {"renderer": "compact"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(marker))
    return str(folder)


def make_subject(model: str, *, weights: Mapping[str, float] | None = None, **values: Any) -> Subject:
    """A job as the command line reads it: `train` and `suite` hold what somebody wrote."""
    register_toys()
    suite = {"weights": dict(weights or {ECHO: 1.0}), **values.pop("suite", {})}
    return Subject.of_job(Job.parse({"model": model, "suite": suite, **values}))


def path_for_children() -> str:
    """PYTHONPATH with which a child finds these environments."""
    paths: Sequence[str] = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(filter(None, paths))


def forget_plants() -> None:
    """Remove what `Leaky` left on the machine: files, shared memory, and leases on its list."""
    for folder in ("/tmp", "/dev/shm"):
        for path in Path(folder).glob(f"{Path(PLANTED).name}*"):
            path.unlink(missing_ok=True)
    from palaestra.sandboxes._records import forget, list_leases

    for lease in list_leases():
        if lease.label == "test" and lease.id.startswith(f"doctor-test-{_SESSION}-"):
            with contextlib.suppress(FileNotFoundError):
                forget(lease.id)
