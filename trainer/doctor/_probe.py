"""The parent's end of the process in which environments are probed; one that died or is late is replaced.

Invariant: nothing of it lives after `aclose`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palaestra.envs import EnvSuite, registration
from palaestra.errors import WorkerError
from palaestra.processes import WorkerProcess
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor._env_worker import FarModel, Played, ProbeSetup, Stay
from palaestra.trainer.doctor._marks import MARK, end_marked
from palaestra.trainer.doctor._variance import SampledGroups

_TARGET = "palaestra.trainer.doctor._env_worker:build"
_START_S, _LATE_S = 60.0, 20.0
_LOG_LINES, _LOG_BYTES = 6, 16_384


class EnvProbe:
    """Plays a suite's environments one after another, away from this process."""

    def __init__(self, suite: EnvSuite, folder: Path, *, concurrency: int, seed: int, name: str = "probe") -> None:
        scratch = folder / name
        scratch.mkdir()
        registrations = tuple(registration(env_id) for env_id in suite.env_ids)
        self._setup = ProbeSetup(suite, registrations, concurrency, seed, scratch)
        self.mark = str(scratch)
        self._log_path = folder / f"{name}.log"
        self._worker: WorkerProcess | None = None

    async def play_well(self, env_id: str, count: int, limit_s: float) -> Played:
        """The expert's episodes on `count` tasks, or what of them ended in time; random play where there is none."""
        played: Played = await self._call("play_well", env_id, count, limit_s)
        return played

    async def play_rounds(self, env_id: str, count: int, limit_s: float) -> tuple[Played, Stay]:
        """Several rounds of `count` episodes that go all ways: those of random calls, and what stayed behind."""
        result: tuple[Played, Stay] = await self._call("play_rounds", env_id, count, limit_s)
        return result

    async def sample_groups(self, model: FarModel, config: GRPOConfig, limit_s: float) -> SampledGroups:
        """A few groups of the model itself."""
        groups: SampledGroups = await self._call("sample_groups", model, config, limit_s)
        return groups

    async def aclose(self) -> None:
        """End the process and whatever an environment left behind; idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.aclose()
        await end_marked(self.mark)

    async def _call(self, method: str, what: object, how: object, limit_s: float) -> Any:
        if self._worker is None:
            self._worker = await WorkerProcess.start(
                _TARGET,
                self._setup,
                name="the process of the environments",
                log_path=self._log_path,
                start_timeout_s=_START_S,
                env={MARK: self.mark},
            )
        try:
            return await self._ask(self._worker, method, what, how, limit_s)
        except BaseException:  # it may still be busy with this call: the next environment gets a fresh one
            worker, self._worker = self._worker, None
            await worker.aclose(timeout_s=0)
            raise

    async def _ask(self, worker: WorkerProcess, method: str, what: object, how: object, limit_s: float) -> Any:
        size = self._log_path.stat().st_size
        try:
            return await worker.call(method, what, how, limit_s, timeout_s=limit_s + _LATE_S)
        except WorkerError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise WorkerError(f"{error}; it is at {_innermost(await worker.stacks())}") from error
            told = str(error).partition(f"; see {self._log_path}")[0]  # which goes with the examination's folder
            raise WorkerError(f"{told}; its log ends: {_end_of(self._log_path, size)}") from error


def _end_of(path: Path, start: int) -> str:
    """The last lines that were written after byte `start`."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return " | ".join([line.strip() for line in lines if line.strip()][-_LOG_LINES:]) or "(nothing)"


def _innermost(stacks: str) -> str:
    """Where the main thread is, which answers the signal and so comes last."""
    lines = stacks.rpartition("most recent call first):")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), "an unknown place")
