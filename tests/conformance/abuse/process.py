"""Attempts 17 to 35: too many processes, too much memory, what will not die, and who else can be reached."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import palaestra
from palaestra.errors import SandboxError
from palaestra.sandboxes import Capability, Ended, Sandbox
from tests.conformance.abuse.filesystem import fills_within_its_size
from tests.conformance.abuse.scene import DONE, Scene, attempt, proves_itself, sleeper
from tests.sandboxes.hostview import eventually, processes_with

_MOST = 64  # the usual limit
_BOMB = """
libc.prctl(15, told["name"].encode())
count = 0
try:
    while count < told["most"]:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError as error:
    said["errno"] = errno.errorcode[error.errno]
said["count"] = count
time.sleep(0.3)
"""
_THREADS = """
threading.stack_size(1 << 18)
count = 0
try:
    while count < told["most"]:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except RuntimeError:
    said["errno"] = "EAGAIN"
said["count"] = count
print(json.dumps(said), flush=True)
os._exit(0)
"""
_REAL_BOMB = """
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def _named(name: str) -> int:
    """How many processes of the machine call themselves so."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += (entry / "comm").read_text().strip() == name
            except OSError:
                continue
    return count


async def _most_named(name: str, during: asyncio.Task[object]) -> int:
    most = 0
    while not during.done():
        most = max(most, _named(name))
        await asyncio.sleep(0.05)
    return most


async def _works(box: Sandbox) -> bool:
    """Another box can start processes of its own."""
    result = await box.run_python("import os\nif os.fork(): os.wait(); print('two')")
    return result.stdout == b"two\n"


@attempt(17, "fork-bomb", Capability.PROCESSES)
async def _(scene: Scene) -> bool:
    other = await scene.make()
    most = 80 if scene.is_unsafe else 1000
    async with asyncio.TaskGroup() as group:
        bomb = group.create_task(scene.ask(_BOMB, most=most, name=scene.marker))
        counted = group.create_task(_most_named(scene.marker, bomb))
        worked = group.create_task(_works(other))
    said = bomb.result()
    assert worked.result()
    assert counted.result() > 32  # it really ran, and the host saw it
    assert await eventually(lambda: _named(scene.marker) == 0, 2.0)
    if said.get("errno") != "EAGAIN" or not said["count"] <= _MOST or counted.result() > _MOST:
        return False
    async with asyncio.TaskGroup() as group:
        exploded = group.create_task(scene.run(_REAL_BOMB, wall_s=1.0))
        worked = group.create_task(_works(other))
    assert worked.result()
    assert exploded.result().ended is Ended.WALL_TIMEOUT
    return (await scene.box.exec(["true"])).is_ok


@attempt(18, "thread-bomb", Capability.PROCESSES)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_THREADS, most=80 if scene.is_unsafe else 1000)
    return bool(said.get("errno") == "EAGAIN" and 32 < said["count"] <= _MOST)


_TAKE = "said['taken'] = len(bytearray(told['mb'] << 20)) >> 20"


async def _takes_it(scene: Scene) -> None:
    assert scene.ask_plainly(_TAKE, mb=600)["taken"] == 600


@attempt(19, "too-much-memory", control=_takes_it)
async def _(scene: Scene) -> bool:
    result = await scene.run(_TAKE + "\nprint('HAD IT')", mb=1536)
    assert result.ended is Ended.OOM if Capability.MEMORY in scene.capabilities else b"MemoryError" in result.stderr
    return b"HAD IT" not in result.stdout


_TOGETHER = """
import select
reader, writer = os.pipe()
for _ in range(told["count"]):
    if os.fork() == 0:
        data = bytearray(told["mb"] << 20)
        os.write(writer, b"x")
        time.sleep(30)
held = 0
while held < told["count"] and not os.waitpid(-1, os.WNOHANG)[0]:
    if select.select([reader], [], [], 0.02)[0]:
        held += len(os.read(reader, 99))
print(held, flush=True)
os._exit(held < told["count"])
"""


@attempt(20, "too-much-memory-together", Capability.MEMORY)
async def _(scene: Scene) -> bool:
    count, size_mb = (3, 200) if scene.is_unsafe else (6, 300)
    result = await scene.run(_TOGETHER, count=count, mb=size_mb)
    if result.stdout == b"%d\n" % count:
        return False
    assert result.ended is Ended.OOM, result
    return (await scene.box.run_python("print('next')")).stdout == b"next\n"


@attempt(21, "fill-the-shared-memory", Capability.DISK)
async def _(scene: Scene) -> bool:
    return await fills_within_its_size(scene, "/dev/shm")


_STUBBORN = "for n in (15, 1, 2): signal.signal(n, signal.SIG_IGN)\n"


async def _is_not_ended_by_sigterm(scene: Scene) -> None:
    code = "import signal, time\n" + _STUBBORN + "print('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()


@attempt(22, "sleeper-that-ignores-sigterm", control=_is_not_ended_by_sigterm)
async def _(scene: Scene) -> bool:
    code = _STUBBORN + 'print("ready", flush=True)\nif os.fork() == 0: os.execvp("sleep", ["sleep", told["name"]])\n'
    result = await scene.run(code + "time.sleep(60)", name=scene.marker, wall_s=1.0)
    left = processes_with(scene.marker)
    assert (result.stdout, left) == (b"ready\n", [])
    assert result.ended is Ended.WALL_TIMEOUT
    return 1.0 <= result.wall_s < 2.0


_DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(told["closes"]):
            os.close(number)
        os.execvp("sleep", ["sleep", told["name"]])
    os._exit(0)
os.wait()
time.sleep(0.2)
"""


async def _daemon_survives(scene: Scene) -> None:
    scene.ask_plainly(_DAEMON, name=scene.marker, closes=3)
    (pid,) = processes_with(scene.marker)
    os.kill(pid, signal.SIGKILL)
    assert await eventually(lambda: not processes_with(scene.marker))


@attempt(23, "daemon", control=_daemon_survives)
async def _(scene: Scene) -> bool:
    result = await scene.run(_DAEMON, name=scene.marker, closes=3)
    assert result.is_ok
    assert result.num_survivors >= 1
    return processes_with(scene.marker) == []


async def _reader_waits_for_the_daemon(scene: Scene) -> None:
    command = ["sh", "-c", f"setsid sleep {scene.marker} & echo started"]
    with pytest.raises(subprocess.TimeoutExpired) as waited:
        subprocess.run(command, capture_output=True, timeout=0.5)
    assert waited.value.output == b"started\n"
    for pid in processes_with(scene.marker):
        os.kill(pid, signal.SIGKILL)


@attempt(24, "daemon-that-holds-the-output", control=_reader_waits_for_the_daemon)
async def _(scene: Scene) -> bool:
    result = await scene.box.exec(["sh", "-c", f"setsid sleep {scene.marker} & echo started"])
    assert (result.stdout, result.ended, result.num_survivors) == (b"started\n", Ended.EXIT, 1)
    return result.wall_s < 1.0 and processes_with(scene.marker) == []


_CLOSING = "import os, time\nprint('said', flush=True)\nos.close(1)\nos.close(2)\ntime.sleep(60)"


async def _end_of_output_is_not_the_end(scene: Scene) -> None:
    with subprocess.Popen([sys.executable, "-c", _CLOSING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"said\n"
        assert process.poll() is None
        process.kill()


@attempt(25, "goes-on-without-output", control=_end_of_output_is_not_the_end)
async def _(scene: Scene) -> bool:
    result = await scene.box.run_python(_CLOSING, wall_s=1.0)
    assert (result.stdout, result.ended) == (b"said\n", Ended.WALL_TIMEOUT)
    return result.wall_s < 2.0


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
"""


@attempt(30, "host-paths-and-variables", Capability.HOST_PROCESSES)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_LOOK_AROUND)
    assert "palaestra" in said["text"] or "python" in said["text"]
    root = str(Path(palaestra.__file__).resolve().parents[2])
    words = [sys.prefix, os.getcwd(), root, f"{tempfile.gettempdir()}/palaestra", "PYTEST_CURRENT_TEST"]
    return not any(word in said["text"] for word in words)


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


_CRASH = """
import resource
def allow():
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    except ValueError:
        raise PermissionError(errno.EPERM, "") from None
attempt("allow", allow)
pid = os.fork()
if pid == 0:
    os.abort()
status = os.waitpid(pid, 0)[1]
said["signal"], said["dumped"] = os.WTERMSIG(status), os.WCOREDUMP(status)
said["files"] = os.listdir()
"""


async def _dumps(scene: Scene) -> None:
    said = scene.ask_plainly(_CRASH)
    assert said["dumped"] or said["allow"] != DONE


@attempt(33, "core-dump", control=_dumps)
async def _(scene: Scene) -> bool:
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    said = await scene.ask(_CRASH)
    assert (said["signal"], pattern.read_text()) == (signal.SIGABRT, before)
    if scene.is_unsafe:
        return not said["dumped"]
    return not said["dumped"] and said["files"] == [] and said["allow"] != DONE


_ZOMBIES = """
libc.prctl(15, told["name"].encode())
said["own"] = 0
try:
    while said["own"] < 50:
        if os.fork() == 0:
            os._exit(0)
        said["own"] += 1
except OSError as error:
    said["errno"] = errno.errorcode[error.errno]
time.sleep(told["wait_s"])
"""
_ORPHANS = """
libc.prctl(15, told["name"].encode())
said["orphans"] = 0
while said["orphans"] < 1000:
    try:
        pid = os.fork()
        if pid == 0:
            os.fork()
            os._exit(0)
        os.waitpid(pid, 0)
        said["orphans"] += 1
    except BlockingIOError:
        time.sleep(0.002)
"""


async def _stay(scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        plain = group.create_task(asyncio.to_thread(scene.ask_plainly, _ZOMBIES, name=scene.marker, wait_s=2.0))
        assert await eventually(lambda: _named(scene.marker) >= 50, 10.0)
    assert plain.result()["own"] == 50


@attempt(34, "zombies", control=_stay)
async def _(scene: Scene) -> bool:
    assert (await scene.ask(_ZOMBIES, name=scene.marker, wait_s=0.0))["own"] == 50
    assert _named(scene.marker) == 0
    # more than its limit of processes, one after the other: the server must reap them meanwhile
    assert (await scene.ask(_ORPHANS, name=scene.marker))["orphans"] == 1000
    return _named(scene.marker) == 0


@attempt(35, "exit-codes-that-look-like-limits", control=proves_itself)
async def _(scene: Scene) -> bool:
    ended = []
    for code in (1, 124, 125, 126, 127, 137, 143, 255):
        result = await scene.box.exec(["sh", "-c", f"exit {code}"])
        ended.append((result.ended, result.exit_code, result.signal) == (Ended.EXIT, code, None))
        assert not result.is_ok
    for number in (6, 9, 11, 15, 24, 25):  # the last two are what the kernel ends at limits of CPU and file size
        result = await scene.box.exec(["sh", "-c", f"kill -{number} $$"])
        ended.append((result.exit_code, result.signal) == (None, number))
        assert result.ended is (Ended.DISK if number == signal.SIGXFSZ else Ended.SIGNAL), result
    began_s = time.monotonic()
    assert (await scene.box.exec(["sh", "-c", "kill -9 0"])).signal == signal.SIGKILL
    assert time.monotonic() - began_s < 2.0
    return all(ended)
