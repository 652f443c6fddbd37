"""The parent's side of the desk: one server process and one HTTP client, and a session for each episode.

Invariant: what the desk refuses (4xx) is a `ToolError` that the agent reads; everything that is the
infrastructure's fault (no connection, no answer in time, 5xx, an unknown token) is a `SandboxError`. A folder
of a server is removed with it, or at the next start when its owner was killed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx

from palaestra.envs._tools import ToolError
from palaestra.envs.desk._service import HOST, KEEP_ALIVE_S, DeskServiceConfig
from palaestra.errors import SandboxError, WorkerError
from palaestra.processes import WorkerProcess

_PREFIX = "palaestra-desk-"
_START_S = 60.0
_HEALTH_S = 5.0
_MAX_CONNECTIONS = 8
"""The HTTP library looks at every idle connection for every request, and the server has one thread anyway. The limit is
not the library's: a request that is cancelled while it waits there can take a place of its pool for good
(https://github.com/encode/httpcore/issues/1093)."""


class DeskServer:
    """A running server, shared by all episodes of one `Resources`. Made by `start`, ended by `aclose`."""

    def __init__(self, worker: WorkerProcess, folder: Path, port: int, admin_key: str) -> None:
        self.port = port
        self._worker = worker
        self.log_folder = folder
        self._admin = _bearer(admin_key)
        self._is_suspect = False
        # dropped well before the server would: a request on a connection that it is closing would fail
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S / 10)
        self._turns = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(base_url=f"http://{HOST}:{port}", limits=limits, trust_env=False)

    @classmethod
    async def start(cls, *, port: int = 0) -> DeskServer:
        """Start a server process; `port` 0 takes any free one.

        Raises `ConfigError` when a given port cannot be had or a package is missing, else `SandboxError`.
        """
        await asyncio.to_thread(_sweep)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        admin_key = secrets.token_urlsafe(16)
        worker: WorkerProcess | None = None
        try:
            worker = await WorkerProcess.start(
                "palaestra.envs.desk._service:serve",
                DeskServiceConfig(admin_key=admin_key, port=port),
                name="desk server",
                log_path=folder / "server.log",
                start_timeout_s=_START_S,
            )
            actual_port = await worker.call("port", timeout_s=_START_S)
        except BaseException as error:
            if worker is not None:
                await worker.aclose()
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, WorkerError | SandboxError):
                raise SandboxError(f"the desk server did not start: {error}") from error
            raise
        return cls(worker, folder, actual_port, admin_key)

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._worker.pid

    async def is_usable(self) -> bool:
        """Whether new episodes may be opened: the process lives, and after any failure it answers again."""
        if not self._worker.is_alive:
            return False
        if self._is_suspect:
            try:
                await self.request("GET", "/health", headers=self._admin, timeout_s=_HEALTH_S)
            except SandboxError:
                return False
            self._is_suspect = False
        return True

    async def open_session(self, tables: object, *, timeout_s: float) -> DeskSession:
        """A database of its own with these rows; every request in it has `timeout_s`."""
        reply = await self.request(
            "POST", "/episodes", headers=self._admin, timeout_s=timeout_s, body={"tables": tables}
        )
        return DeskSession(self, reply["token"], timeout_s)

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str],
        timeout_s: float,
        body: object = None,
        query: dict[str, str] | None = None,
    ) -> Any:
        """One request; the JSON of the answer. Raises `ToolError` or `SandboxError`, see the module."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._turns.acquire()
        except TimeoutError as error:
            raise SandboxError(f"desk server, {method} {path}: no turn within {timeout_s:g} s") from error
        try:
            if self._client.is_closed:
                raise SandboxError(f"desk server, {method} {path}: it failed and was replaced; begin a new episode")
            response = await self._client.request(
                method, path, headers=headers, json=body, params=query, timeout=timeout_s
            )
        except httpx.TransportError as error:
            self._is_suspect = True
            reason = str(error) or type(error).__name__
            raise SandboxError(f"desk server, {method} {path}: {reason} (timeout {timeout_s:g} s)") from error
        finally:
            self._turns.release()
        return _answer(response, f"{method} {path}")

    async def aclose(self, *, grace_s: float = 5.0) -> None:
        """Close the client, end the process (by force after `grace_s`), remove its log. Idempotent."""
        try:
            await self._client.aclose()
        finally:
            await self._worker.aclose(timeout_s=grace_s)
            shutil.rmtree(self.log_folder, ignore_errors=True)


class DeskSession:
    """One episode's access to its own database."""

    def __init__(self, server: DeskServer, token: str, timeout_s: float) -> None:
        self._server = server
        self._headers = _bearer(token)
        self._timeout_s = timeout_s

    async def request(self, method: str, path: str, *, body: object = None, query: dict[str, str] | None = None) -> Any:
        """One request with this episode's token."""
        return await self._server.request(
            method, path, headers=self._headers, timeout_s=self._timeout_s, body=body, query=query
        )

    async def close(self) -> dict[str, list[dict[str, Any]]]:
        """Delete the database; its final rows by table."""
        tables: dict[str, list[dict[str, Any]]] = await self.request("DELETE", "/episodes/current")
        return tables


def _sweep() -> None:
    """Remove the folders of dead owners; a number that came again keeps one until that process ends too."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def _answer(response: httpx.Response, what: str) -> Any:
    try:
        value = response.json()
    except ValueError as error:
        raise SandboxError(f"desk server, {what}: {response.status_code} without JSON") from error
    if response.is_success:
        return value
    detail = value.get("detail") if isinstance(value, dict) else value
    if response.is_client_error and response.status_code != httpx.codes.UNAUTHORIZED:
        raise ToolError(str(detail))
    raise SandboxError(f"desk server, {what}: {response.status_code} {detail}")
