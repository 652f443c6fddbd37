"""The sandbox of one episode: leased when first needed, replaced when the agent's code destroyed it.

Invariants: the agent's code runs nowhere else; after `aclose` nothing of the episode is left; a box that
fails by itself raises `SandboxError`, and one that the agent's code destroyed never does.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress

from palaestra.envs.code._grading import Grade, grade
from palaestra.envs.code._tests import Tests
from palaestra.resources import Resources
from palaestra.sandboxes import (
    Capability,
    Ended,
    ExecResult,
    Limits,
    Sandbox,
    SandboxBackend,
    SandboxPool,
    SandboxSpec,
    open_backend,
)

_SPEC = SandboxSpec(
    limits=Limits(wall_s=10.0, cpu_s=10.0, memory_mb=256, processes=32, workspace_mb=16, file_mb=8),
    needs=Capability.isolating(),
)
_DESTRUCTIVE = (Ended.SANDBOX_KILLED, Ended.OOM)


class _Boxes:
    """A back end and its pool, shared by all episodes of one `Resources`."""

    def __init__(self, backend: SandboxBackend, num_ready: int) -> None:
        self.pool = SandboxPool(backend, _SPEC, num_ready)
        self._backend = backend

    async def aclose(self) -> None:
        """Close the pool, then the back end."""
        try:
            await self.pool.aclose()
        finally:
            await self._backend.aclose()


class Workspace:
    """Runs, tests and files of one episode. `files` are put into every box before it is first used."""

    def __init__(self, resources: Resources, backend_name: str, num_ready: int, files: dict[str, str]) -> None:
        self._resources = resources
        self._backend_name = backend_name
        self._num_ready = num_ready
        self._files = dict(files)
        self._lease = AsyncExitStack()
        self._box: Sandbox | None = None

    async def grade(self, source: str, tests: Tests, *, wall_s: float) -> Grade:
        """Run `source` on the calls of `tests`, within `wall_s` seconds."""
        result = await grade(await self._take(), source, tests, wall_s=wall_s)
        await self._replace_if_destroyed(result.ended)
        return result

    async def shell(self, command: str, *, wall_s: float) -> ExecResult:
        """Run a shell command in /workspace, within `wall_s` seconds."""
        box = await self._take()
        result = await box.exec(["/bin/sh", "-c", command], wall_s=wall_s)
        await self._replace_if_destroyed(result.ended)
        return result

    async def read(self, path: str) -> str:
        """A text file; raises `OSError` like `open`, and `ValueError` for a name that no file can have."""
        box = await self._take()
        return (await box.read_file(_in_workspace(path), max_bytes=1 << 16)).decode(errors="replace")

    async def write(self, path: str, content: str) -> None:
        """Create or replace a text file; raises like `read`. It outlives the box."""
        box = await self._take()
        await box.write_file(_in_workspace(path), content.encode(errors="replace"))
        self._files[path] = content

    async def aclose(self) -> None:
        """Give the box back; idempotent."""
        self._box = None
        await self._lease.aclose()

    async def _take(self) -> Sandbox:
        if self._box is None:
            boxes = await self._resources.get(("code boxes", self._backend_name, self._num_ready), self._open)
            box = await self._lease.enter_async_context(boxes.pool.lease())
            for path, content in self._files.items():
                with suppress(OSError):  # the agent may have made a folder of what was a file
                    await box.write_file(_in_workspace(path), content.encode(errors="replace"))
            self._box = box
        return self._box

    async def _open(self) -> _Boxes:
        return _Boxes(await open_backend(self._backend_name), self._num_ready)

    async def _replace_if_destroyed(self, ended: Ended) -> None:
        if ended in _DESTRUCTIVE:
            await self.aclose()


def _in_workspace(path: str) -> str:
    return path if path.startswith("/") else f"/workspace/{path}"
