"""The server's process: one event loop with the back end and uvicorn on it.

Invariant: it listens only when this machine can really make boxes, and beyond loopback only with a token; when it
ends, its boxes have ended.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from palaestra.errors import ConfigError
from palaestra.sandboxes._backends import open_backend
from palaestra.sandboxes._frames import TOKEN_VARIABLE, check_token
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._managed import Admission

if TYPE_CHECKING:
    from fastapi import FastAPI

DEFAULT_PORT = 8766
LEASE_S = 60.0

_KEEP_ALIVE_S = 600  # the client drops an idle connection sooner: a request must not meet its closing
_GRACEFUL_S = 2
_MAX_LEASE_S = 86_400.0


def serve(
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    backend: str = "jail",
    token: str | None = None,
    *,
    lease_s: float = LEASE_S,
    admission: Admission | None = None,
    on_ready: Callable[[str], object] = print,
) -> None:
    """Hold boxes for clients until SIGTERM or SIGINT; `on_ready` gets the address. Port 0 takes any free one.

    `token` is PALAESTRA_SANDBOX_TOKEN by default. Raises `ConfigError` when it is missing for a host that others
    reach, when this machine cannot make such boxes, and when the port cannot be had.
    """
    token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
    if not token and not _is_loopback(host):
        raise ConfigError(f"others reach {host}: set {TOKEN_VARIABLE} to a secret of at least 16 characters")
    if token:
        check_token(token)
    if not 1 <= lease_s <= _MAX_LEASE_S:
        raise ConfigError(f"lease_s must be within 1 and {_MAX_LEASE_S:g} seconds, not {lease_s:g}")
    asyncio.run(_serve(host, port, backend, token, lease_s, admission, on_ready))


async def _serve(
    host: str,
    port: int,
    backend_name: str,
    token: str,
    lease_s: float,
    admission: Admission | None,
    on_ready: Callable[[str], object],
) -> None:
    try:
        from palaestra.sandboxes.server._app import create_app
    except ImportError as error:
        raise ConfigError(
            f"the sandbox server needs the package {error.name}: run `pip install 'palaestra[tools]'`"
        ) from error
    backend = await open_backend(backend_name, admission=admission, label=f"sandbox server on port {port}")
    try:
        await (await backend.create(SandboxSpec())).aclose()
        queue_s = (admission or Admission()).queue_s
        app = create_app(backend, token=token, lease_s=lease_s, queue_s=queue_s)
        with _listen(host, port) as listener:
            name = f"[{host}]" if ":" in host else host
            await _run(app, listener, lambda: on_ready(f"http://{name}:{listener.getsockname()[1]}"))
    finally:
        await backend.aclose()


async def _run(app: FastAPI, listener: socket.socket, on_ready: Callable[[], object]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACEFUL_S,
    )
    await Server(settings).serve([listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"the sandbox server cannot listen on {host}:{port}: {reason}; take another port") from error
    # connections inherit it; asyncio leaves it out for sockets made like this one, and each answer then takes 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
