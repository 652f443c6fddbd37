"""A sandbox server in a process of its own, which a test may kill."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from palaestra.sandboxes._records import list_leases

_START_S = 60.0
_SERVE = """
import json, sys
from palaestra.sandboxes import Admission
from palaestra.sandboxes.server import serve

given = json.loads(sys.argv[1])
given["admission"] = Admission(**given["admission"]) if given["admission"] else None
serve(on_ready=lambda url: print(url, flush=True), **given)
"""


@dataclass(frozen=True)
class Server:
    """What a test needs of it."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def boxes(self) -> list[str]:
        """The boxes that it holds, by the host's own list."""
        return [lease.id for lease in list_leases() if lease.owner_pid == self.process.pid]

    def kill(self) -> None:
        """Its violent death."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def running_server(
    *, port: int = 0, token: str = "", lease_s: float = 60.0, admission: dict[str, Any] | None = None, before: str = ""
) -> Iterator[Server]:
    """A server of jails on loopback, which has ended after the block; it runs the code `before` first."""
    settings = {"port": port, "token": token, "lease_s": lease_s, "admission": admission}
    process = start_python(before + _SERVE, json.dumps(settings))
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], _START_S)[0], "the server did not start"
        url = process.stdout.readline().decode().strip()
        assert url, f"the server ended with {process.wait(10)}"
        yield Server(url, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.stdout.close()


def start_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A Python process with these sources; stdout is a pipe."""
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
