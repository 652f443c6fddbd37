"""The desk's server process: uvicorn in a thread of the child, on a loopback port.

Invariant: the port is bound before the parent hears that the service is built, and released with the process.
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from palaestra.errors import ConfigError, SandboxError
from palaestra.processes import Reply

if TYPE_CHECKING:
    import uvicorn

HOST = "127.0.0.1"
KEEP_ALIVE_S = 600
"""How long the server keeps an idle connection, in seconds; the client must drop it sooner."""

_STOP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskServiceConfig:
    """What the child is told: the administrator's bearer token, and the port (0 for any free one)."""

    admin_key: str
    port: int = 0


class DeskService:
    """Runs the HTTP server beside the worker's own loop; `address` answers the port."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._server = server
        self._port = int(listener.getsockname()[1])
        self._thread = threading.Thread(target=server.run, args=([listener],), name="desk-http", daemon=True)
        self._thread.start()

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Answer `port`; anything else is refused."""
        if method != "port":
            raise SandboxError(f"the desk server has no method {method!r}")
        reply.send(self._port)

    def work(self) -> bool:
        """Nothing to do between calls: HTTP has its own thread."""
        return False

    def close(self) -> None:
        """Stop the HTTP server; whatever still runs dies with the process."""
        self._server.should_exit = True
        self._thread.join(_STOP_S)


def serve(config: DeskServiceConfig) -> DeskService:
    """Bind and start; raises `ConfigError` when a package is missing or the given port cannot be had."""
    try:
        import uvicorn

        from palaestra.envs.desk._app import create_app
    except ImportError as error:
        raise ConfigError(
            f"the desk server needs the package {error.name}: run `pip install 'palaestra[tools]'`"
        ) from error
    listener = _listen(config.port)
    settings = uvicorn.Config(
        create_app(config.admin_key),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    return DeskService(uvicorn.Server(settings), listener)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port), backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if not port:
            raise SandboxError(f"cannot listen on any port of {HOST}: {reason}") from error
        remedy = "free the port, or set server_port = 0 to take any free one"
        raise ConfigError(f"the desk server cannot listen on {HOST}:{port}: {reason}; {remedy}") from error
