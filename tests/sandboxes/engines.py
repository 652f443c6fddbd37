"""Container engines looked at past our own client: what they list, and what of this machine belongs to it.

Invariant: a look costs milliseconds and leaves no connection, so that it may be repeated while something is timed.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOCKETS = {
    "docker": ("DOCKER_HOST", "/var/run/docker.sock"),
    "podman": ("CONTAINER_HOST", "/run/podman/podman.sock"),
}
_OWNER_LABEL = "palaestra.owner"
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Container:
    """What an engine says of a container of ours or of others."""

    engine: str
    id: str
    name: str
    labels: dict[str, str]

    @property
    def owner_pid(self) -> int | None:
        """The process that made it, by its label; None when it has none."""
        parts = self.labels.get(_OWNER_LABEL, "").split(":")
        return int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else None


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


def ask(engine: str, target: str) -> Any:
    """The engine's answer to a GET; None where no engine answers at a unix socket, or when it does not know."""
    variable, usual = _SOCKETS[engine]
    path = os.environ.get(variable, f"unix://{usual}").removeprefix("unix://")
    connection = _Connection(path)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        body = answer.read()
    except OSError:
        return None
    finally:
        connection.close()
    return json.loads(body) if answer.status == 200 else None


def containers(*, owned: bool = False) -> list[Container]:
    """All containers of all engines, running or not; only those with an owner's label if `owned`."""
    filters = urllib.parse.quote(json.dumps({"label": [_OWNER_LABEL]})) if owned else ""
    return [
        Container(engine, one["Id"], (one["Names"] or ["/"])[0].lstrip("/"), one["Labels"] or {})
        for engine in _SOCKETS
        for one in ask(engine, "/containers/json?all=1" + (f"&filters={filters}" if filters else "")) or ()
    ]


def inspect(container: Container) -> dict[str, Any]:
    """All that its engine knows of a container; empty when it is gone."""
    return ask(container.engine, f"/containers/{container.id}/json") or {}


def words_of(container: Container) -> set[str]:
    """Words of which one is in the path of whatever an engine keeps for a container: mounts and cgroups."""
    known = inspect(container)
    layer = ((known.get("GraphDriver") or {}).get("Data") or {}).get("MergedDir") or ""
    network = (known.get("NetworkSettings") or {}).get("SandboxKey") or ""
    return {container.id, *filter(None, (Path(layer).parent.name, Path(network).name))}
