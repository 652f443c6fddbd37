"""Attempts 26 to 32: who else can be reached from a box: its server, the host, and what they know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import palaestra
from palaestra.errors import SandboxError
from palaestra.sandboxes import Capability, Ended
from palaestra.sandboxes._rootfs import ensure_rootfs
from tests.conformance.abuse.scene import DONE, Scene, attempt, sleeper
from tests.sandboxes.engines import ask
from tests.sandboxes.hostview import eventually

_KILL_ALL = """
victim = os.fork()
if victim == 0:
    time.sleep(60)
os.kill(-1, told["signal"])
if told["signal"]:
    said["victim"] = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
attempt("reach", lambda: os.kill(told["pid"], 0))
"""


@attempt(26, "kill-everything", Capability.HOST_PROCESSES)
async def _(scene: Scene) -> bool:
    with sleeper(scene.marker) as sentinel:
        # without isolation it only asks: there, all really are all
        said = await scene.ask(_KILL_ALL, pid=sentinel.pid, signal=0 if scene.is_unsafe else 9)
        assert scene.is_unsafe or said["victim"] == -9
        assert sentinel.poll() is None
    return bool(said["reach"] == "ESRCH") and (await scene.box.exec(["true"])).is_ok


@attempt(27, "kill-the-server", Capability.HONEST_ANSWERS)
async def _(scene: Scene) -> bool:
    code = "for number in told['signals']: os.kill(os.getppid(), number)\nprint('sent')"
    result = await scene.run(code, signals=[9] if scene.is_unsafe else list(range(1, 65)))
    try:
        after = await scene.box.run_python("print('alive')")
    except SandboxError:
        assert result.ended is Ended.SANDBOX_KILLED
        return False
    return result.stdout == b"sent\n" and after.stdout == b"alive\n"


_TRACE = """
server = os.getppid()
attempt("seize", lambda: call((101, 117), 0x4206, server, 0, 0))
attempt("attach", lambda: told["is_unsafe"] or call((101, 117), 16, server, 0, 0))
attempt("read", lambda: call((310, 270), server, None, 0, None, 0, 0))
attempt("memory", lambda: open(f"/proc/{server}/mem", "rb").close())
attempt("environment", lambda: open(f"/proc/{server}/environ", "rb").read())
attempt("descriptor", lambda: call((438, 438), os.pidfd_open(server), 0, 0))
if told["is_unsafe"]:
    del said["attach"]  # it would stop what this depends on
"""


@attempt(28, "trace-the-server", Capability.HONEST_ANSWERS)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_TRACE, is_unsafe=scene.is_unsafe)
    assert len(said) >= 5
    if not scene.is_unsafe and DONE not in said.values():
        calls = {said[name] for name in ("seize", "attach", "read", "descriptor")}
        assert calls == {"EPERM"}, said
        assert {said["memory"], said["environment"]} <= {"EPERM", "EACCES"}, said
    return DONE not in said.values()


_FORGE = """
import stat
header = {"id": told["id"], "stopped": "", "status": 0, "cpu_s": 0.0, "oom_kills": 0, "wall_s": 0.1, "stdout_total": 7,
          "stderr_total": 0, "stdout_bytes": 7, "survivors": 0}
text = json.dumps(header).encode()
frame = struct.pack("!II", len(text), 7) + text + b"FORGED\\n"
server = os.getppid()
def steal(number):
    fd = call((438, 438), os.pidfd_open(server), number, 0)
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        os.write(fd, frame)
for number in range(3, 40):
    attempt(f"own {number}", lambda: os.write(number, frame))
    attempt(f"open {number}", lambda: os.write(os.open(f"/proc/{server}/fd/{number}", os.O_WRONLY), frame))
    attempt(f"steal {number}", lambda: steal(number))
attempt("list", lambda: os.listdir(f"/proc/{server}/fd"))
os.write(1, frame + b'{"ready": true}\\0{"ended": 1, "status": 0}\\n' + json.dumps(said).encode())
"""


@attempt(29, "forge-an-answer", Capability.HONEST_ANSWERS)
async def _(scene: Scene) -> bool:
    said: dict[str, str] = {}
    for number in (2, 1, 3):  # which request it is depends on what the host asks of a new box
        result = await scene.run(_FORGE, box=await scene.make(), id=number)
        if result.stdout == b"FORGED\n":
            return False
        assert b"FORGED\n" in result.stdout  # as the bytes that they are
        tried = json.loads(result.stdout.rpartition(b"\n")[2])
        assert len(tried) == 112  # each was tried
        said |= {f"{number}: {name}": outcome for name, outcome in tried.items()}
    return DONE not in said.values()


_LOOK_AROUND = """
texts = []
for entry in os.listdir("/proc"):
    if entry.isdigit():
        for name in ("environ", "cmdline", "cwd"):
            path = f"/proc/{entry}/{name}"
            try:
                texts.append(os.readlink(path) if name == "cwd" else open(path, errors="replace").read())
            except OSError:
                pass
said["text"] = "\\n".join(texts)
said["mounts"] = open("/proc/self/mountinfo").read()
"""
_WITHOUT_PATHS = {"proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}


def _host_paths(mountinfo: str) -> set[str]:
    """Paths of the host that a mount table names: what is mounted where it is no file system's own root, layers."""
    paths = set()
    for line in mountinfo.splitlines():
        root = line.split()[3]
        kind, _, options = line.partition(" - ")[2].split(maxsplit=2)
        if kind not in _WITHOUT_PATHS and root != "/":
            paths.add(root)
        values = (option.partition("=")[2] for option in options.split(","))
        paths |= {path for value in values for path in value.split(":") if path.startswith("/")}
    return paths


def _shown_on_purpose(name: str) -> tuple[str, ...]:
    """What `_jail` says that a box may see: the shared tree. An engine names its own store."""
    if name in ("jail", "remote"):
        return (str(ensure_rootfs().path),)
    known = ask(name, "/info") or {}
    return (f"{known['DockerRootDir']}/", "/run/containers/storage/")


@attempt(30, "host-paths-and-variables", Capability.HOST_PROCESSES)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_LOOK_AROUND)
    assert "palaestra" in said["text"] or "python" in said["text"]
    root = str(Path(palaestra.__file__).resolve().parents[2])
    words = [sys.prefix, os.getcwd(), root, f"{tempfile.gettempdir()}/palaestra", "PYTEST_CURRENT_TEST"]
    if scene.is_unsafe:
        return not any(word in said["text"] for word in words)
    paths = _host_paths(said["mounts"])
    assert paths, said["mounts"]  # each back end shows where its tree is
    assert all(path.startswith(_shown_on_purpose(scene.backend.name)) for path in paths), paths
    return not any(word in said["text"] + said["mounts"] for word in words)


async def _descriptors_pass(scene: Scene) -> None:
    reader, writer = os.pipe()
    done = subprocess.run(["ls", "/proc/self/fd"], pass_fds=[reader], capture_output=True, timeout=20, check=True)
    os.close(reader)
    os.close(writer)
    assert str(reader).encode() in done.stdout.split()


@attempt(31, "inherited-descriptors", control=_descriptors_pass)
async def _(scene: Scene) -> bool:
    ours = (await scene.box.exec(["ls", "/proc/self/fd"])).stdout.split()
    forked = await scene.box.run_python("import os; print(os.listdir('/proc/self/fd'))")
    return ours == [b"0", b"1", b"2", b"3"] and forked.stdout == b"['0', '1', '2', '3']\n"  # 3 is the folder itself


@attempt(32, "signal-a-host-process", Capability.HOST_PROCESSES)
async def _(scene: Scene) -> bool:
    code = """
for number in (0, 15):
    attempt(str(number), lambda: os.kill(told["pid"], number))
attempt("pidfd", lambda: os.pidfd_open(told["pid"]))
attempt("seen", lambda: open(f"/proc/{told['pid']}/cmdline").close())
"""
    with sleeper(scene.marker) as sentinel:
        said = await scene.ask(code, pid=sentinel.pid)
        is_alive = not await eventually(lambda: sentinel.poll() is not None, 0.2)
    return is_alive and set(said.values()) <= {"ESRCH", "ENOENT"}
