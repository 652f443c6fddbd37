"""Runs agents' Python in a fork of an interpreter that has already imported what such code mostly uses.

Standard library only; runs inside the box. Invariants: the fork looks like a fresh `python -c` (its own
`__main__`, environment, streams, exit code), and the same code prints the same bytes in every box.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import linecache
import os
import random
import signal
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

ENVIRONMENT = {
    "PATH": "/usr/bin",
    "HOME": "/workspace",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",
    "USER": "agent",
    # the same code must print the same bytes in every box
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_CODE_NAME = "<code>"
_SERVER_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PRELOADED = (
    "abc", "argparse", "ast", "bisect", "collections", "contextlib", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "heapq", "io", "itertools", "json", "math", "operator", "pathlib", "random",
    "re", "statistics", "string", "tempfile", "textwrap", "typing", "unittest",
)  # fmt: skip


def preload() -> None:
    """Import what agents' code mostly uses, so that a forked run does not."""
    for name in _PRELOADED:
        __import__(name)
    import site

    site.setquit()
    site.sethelper()
    gc.collect()
    gc.freeze()


def run_source(source: str) -> NoReturn:
    """Run Python source as `__main__` in this process, made fresh before, then end it as the interpreter would."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    linecache.cache[_CODE_NAME] = (len(source), None, source.splitlines(keepends=True), _CODE_NAME)
    code = 0
    try:
        exec(compile(source, _CODE_NAME, "exec"), main.__dict__)
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException as error:
        trace = error.__traceback__
        traceback.print_exception(error.with_traceback(trace.tb_next if trace else None))
        code = 1
    _shut_down()
    os._exit(code)


def settle(environment: dict[str, str]) -> None:
    """Make this process, once, what its forks are to find: environment, arguments, modules, streams.

    What a fork changes itself is a page that the kernel must copy for it, each time.
    """
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c"]
    for name in [name for name in sys.modules if name.split(".")[0] == "palaestra"]:
        del sys.modules[name]
    _open_streams()
    gc.collect()
    gc.freeze()


def make_fresh(workspace: str) -> None:
    """Make a fork of a settled process look like a fresh interpreter: path, interrupts, random state."""
    # last on the path, and never on the server's: a /workspace/json.py must not replace the standard library's
    sys.path[:] = [entry for entry in sys.path if entry != _SERVER_ROOT] + [workspace]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(0)


def _open_streams() -> None:
    def stream(fd: int, mode: str, **options: Any) -> Any:
        return open(fd, mode, encoding="utf-8", closefd=False, **options)

    kept = [os.dup(fd) for fd in range(3)]
    stdin_fd = os.memfd_create("stdin")
    pipe_fds = os.pipe()
    for fd, like in enumerate((stdin_fd, pipe_fds[1], pipe_fds[1])):
        os.dup2(like, fd)  # what they will be in a fork: streams look at their descriptor when they are made
    sys.stdin, sys.stdout = stream(0, "r"), stream(1, "w")
    sys.stderr = stream(2, "w", buffering=1, errors="backslashreplace")
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    for fd, before in enumerate(kept):
        os.dup2(before, fd)
    for fd in (*kept, stdin_fd, *pipe_fds):
        os.close(fd)


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _shut_down() -> None:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:  # the agent's own exit hooks and streams: nothing it raises may keep this process
        os._exit(120)
