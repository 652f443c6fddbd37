"""A Python process forked in advance, so that a run waits for neither the fork nor the interpreter.

Standard library only; runs inside. Invariant: a spare is forked only while no process of the agent is alive, cannot
be debugged or read until its code begins, and never outlives an execution: whatever the agent did to one
in between, the next is new.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, NoReturn

from palaestra.sandboxes._channel import Channel
from palaestra.sandboxes._execution import Child, set_debuggable, start
from palaestra.sandboxes._warm_python import make_fresh, run_source

_CODE_FD = 3


class Spare:
    """A process that waits for Python source, forked from one that is settled (`settle`)."""

    def __init__(self, limits: dict[str, Any], workspace: str) -> None:
        self._stdin_fd = os.memfd_create("stdin")
        code_r, self._code_w = os.pipe()

        def wait() -> NoReturn:
            set_debuggable(False)
            make_fresh(workspace)
            source = _read_all(_CODE_FD)
            os.close(_CODE_FD)
            set_debuggable(True)
            run_source(source.decode(errors="surrogatepass"))

        try:
            self.child = start(limits, wait, (self._stdin_fd, code_r), workspace)
        except OSError:
            os.close(self._stdin_fd)
            os.close(self._code_w)
            raise
        finally:
            os.close(code_r)

    def begin(self, channel: Channel, code_bytes: int) -> Child:
        """Let it run the source in the frame's body, with the rest of the body as its input."""
        view = memoryview(channel.read(code_bytes))
        channel.copy_to(self._stdin_fd)
        os.lseek(self._stdin_fd, 0, os.SEEK_SET)
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the watch will see how
            while view:
                view = view[os.write(self._code_w, view) :]
        self._close()
        return self.child

    def kill(self) -> None:
        """End it unused."""
        self._close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.child.pid, 0)
        os.close(self.child.out_fd)
        os.close(self.child.err_fd)

    def _close(self) -> None:
        os.close(self._stdin_fd)
        os.close(self._code_w)


def _read_all(fd: int) -> bytes:
    chunks = []
    while chunk := os.read(fd, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)
