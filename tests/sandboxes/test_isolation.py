"""What the agent's code must not reach. Each payload proves that it ran by what it prints."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from palaestra.sandboxes import Ended, Limits, Sandbox, SandboxBackend, SandboxSpec

_TRY = """
import os, socket, ctypes
def attempt(name, action):
    try:
        action()
    except OSError as error:
        print(name, type(error).__name__)
    else:
        print(name, "DONE")
"""


async def _attempts(box: Sandbox, body: str) -> dict[str, str]:
    result = await box.run_python(_TRY + body)
    assert result.is_ok, result.stderr
    return dict(line.split() for line in result.stdout.decode().splitlines())


async def test_host_files_are_not_there(box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    body = f"attempt('secret', lambda: open({str(secret)!r}))\nattempt('shadow', lambda: open('/etc/shadow'))"
    assert await _attempts(box, body) == {"secret": "FileNotFoundError", "shadow": "FileNotFoundError"}


async def test_the_userland_is_read_only(box: Sandbox) -> None:
    body = """
for path in ("/etc/passwd", "/usr/lib/python3.11/json/__init__.py", "/palaestra/x", "/new", "/dev/x"):
    attempt(path, lambda: open(path, "a"))
"""
    assert "DONE" not in (await _attempts(box, body)).values()


async def test_privileges_are_gone(box: Sandbox) -> None:
    status = (await box.exec(["cat", "/proc/self/status"])).stdout.decode()
    fields = {name: value for name, _, value in (line.partition(":") for line in status.splitlines())}
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"
    assert fields["Uid"].split() == ["1000"] * 4


async def test_kernel_surface_is_closed(box: Sandbox) -> None:
    body = """
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) == -1:
        raise OSError(ctypes.get_errno(), "")
if os.uname().machine == "x86_64":
    attempt("unshare", lambda: call(272, 0x10000000))
    attempt("clone", lambda: call(56, 0x10000011, 0, 0, 0, 0))
    attempt("mount", lambda: call(165, b"x", b"/tmp", b"tmpfs", 0, 0))
    attempt("keyctl", lambda: call(250, 0, -3, 0))
    attempt("bpf", lambda: call(321, 0, 0, 0))
    attempt("io_uring", lambda: call(425, 1, 0))
    attempt("userfaultfd", lambda: call(323, 0))
    attempt("ptrace", lambda: call(101, 16, 1, 0, 0))
    attempt("prlimit", lambda: call(302, 1, 7, b"\\0" * 16, 0))
    attempt("x32", lambda: call(0x40000000 + 39))
for family in (socket.AF_PACKET, socket.AF_NETLINK, 38, 40):
    attempt(f"family{int(family)}", lambda: socket.socket(family, socket.SOCK_RAW))
"""
    outcome = await _attempts(box, body)
    assert len(outcome) >= 4
    assert "DONE" not in outcome.values()


async def test_host_network_is_not_reached(box: Sandbox) -> None:
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as abstract:
        server.bind(("0.0.0.0", 0))
        server.listen()
        port = server.getsockname()[1]
        abstract.bind(f"\0palaestra-test-{os.getpid()}")
        abstract.listen()
        socket.create_connection(("127.0.0.1", port)).close()  # the server is there
        server.accept()[0].close()
        own_address = socket.gethostbyname(socket.gethostname())
        body = f"""
for host in ("127.0.0.1", "{own_address}", "192.0.2.1"):
    attempt(host, lambda: socket.create_connection((host, {port}), timeout=2))
def abstract():
    socket.socket(socket.AF_UNIX).connect("\\0palaestra-test-{os.getpid()}")
attempt("abstract", abstract)
"""
        outcome = await _attempts(box, body)
        assert outcome
        assert "DONE" not in outcome.values()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_boxes_do_not_reach_each_other(backend: SandboxBackend) -> None:
    first, second = [await backend.create(SandboxSpec()) for _ in range(2)]
    serve = """
import socket
server = socket.create_server(("127.0.0.1", 4455))
server.settimeout(1.5)
open("/tmp/here", "w").write("x"); open("/dev/shm/here", "w").write("x")
socket.create_connection(("127.0.0.1", 4455)); server.accept(); print("self")
try:
    server.accept(); print("VISITED")
except TimeoutError:
    print("alone")
"""
    probe = """
import socket, os, time
for _ in range(20):
    time.sleep(0.05)
    try:
        socket.create_connection(("127.0.0.1", 4455)); print("REACHED")
    except OSError:
        pass
names = [name for name in os.listdir("/proc") if name.isdigit()]
print(os.listdir("/tmp"), os.listdir("/dev/shm"), len(names))
"""
    async with asyncio.TaskGroup() as group:
        served = group.create_task(first.run_python(serve))
        probed = group.create_task(second.run_python(probe))
    assert served.result().stdout == b"self\nalone\n"
    assert probed.result().stdout == b"[] [] 2\n"


async def test_answers_cannot_be_forged(box: Sandbox) -> None:
    body = """
import struct, glob
frame = b'{"id": 1, "stopped": "", "status": 0, "stdout_bytes": 6}'
frame = struct.pack("!II", len(frame), 6) + frame + b"FORGED"
for number in range(3, 40):
    attempt(f"fd{number}", lambda: os.write(number, frame))
    attempt(f"proc{number}", lambda: os.write(os.open(f"/proc/1/fd/{number}", os.O_WRONLY), frame))
attempt("list", lambda: os.listdir("/proc/1/fd"))
attempt("mem", lambda: open("/proc/1/mem", "wb"))
attempt("environ", lambda: open("/proc/1/environ", "rb").read())
"""
    outcome = await _attempts(box, body)
    assert len(outcome) == 77
    assert "DONE" not in outcome.values()
    printed = await box.run_python("import sys, struct; sys.stdout.buffer.write(struct.pack('!II', 2, 0) + b'{}')")
    assert printed.stdout == b"\0\0\0\x02\0\0\0\0{}"


async def test_the_server_survives_signals_from_inside(box: Sandbox) -> None:
    code = "import os\nfor number in (9, 19, 15, 6):\n    os.kill(1, number)\nprint('sent')"
    assert (await box.run_python(code)).stdout == b"sent\n"
    await box.run_python("import os; os.kill(-1, 9)")
    assert (await box.run_python("print('alive')")).stdout == b"alive\n"


async def test_memory_is_limited(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(memory_mb=96)))
    result = await box.run_python("data = bytearray(400 << 20); print('HAD IT')")
    assert result.ended is Ended.OOM or b"MemoryError" in result.stderr
    assert b"HAD IT" not in result.stdout
    assert (await box.run_python("print('next')")).stdout == b"next\n"


async def test_fork_bomb_is_limited_and_others_go_on(backend: SandboxBackend) -> None:
    bombed, other = [await backend.create(SandboxSpec(limits=Limits(processes=16))) for _ in range(2)]
    bomb = """
import os, time
for number in range(1000):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError as error:
        print(number, type(error).__name__, flush=True)
        break
time.sleep(1)
"""
    async with asyncio.TaskGroup() as group:
        exploded = group.create_task(bombed.run_python(bomb))
        worked = group.create_task(other.run_python("import os; print(os.fork() >= 0)"))
    assert exploded.result().stdout == b"15 BlockingIOError\n"
    assert worked.result().stdout.startswith(b"True")
    assert (await bombed.run_python("print('again')")).stdout == b"again\n"


async def test_disk_is_limited(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(workspace_mb=8, file_mb=6)))
    body = """
def fill(path, size):
    with open(path, "wb") as file:
        file.write(bytes(size))
attempt("large", lambda: fill("/workspace/large", 7 << 20))
os.unlink("/workspace/large")
attempt("first", lambda: fill("/workspace/first", 5 << 20))
attempt("second", lambda: fill("/workspace/second", 5 << 20))
attempt("sparse", lambda: os.truncate("/workspace/first", 1 << 40))
"""
    assert await _attempts(box, body) == {"large": "OSError", "first": "DONE", "second": "OSError", "sparse": "OSError"}


async def test_inodes_are_limited(backend: SandboxBackend, box: Sandbox) -> None:
    if backend.name == "podman":
        pytest.skip("podman cannot limit them; the abuse suite shows that it does not claim to")
    code = "try:\n    for n in range(200_000): open(f'/tmp/{n}', 'w').close()\nexcept OSError as e: print(e.errno)"
    assert (await box.run_python(code)).stdout == b"28\n"


_UNNAMED = """
import ctypes, errno, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
column = ("x86_64", "aarch64").index(platform.machine())
def call(numbers, *arguments):
    result = libc.syscall(numbers[column], *arguments)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
print(call((29, 194), 0, 1 << 20, 0o1600))
print(call((68, 186), 0, 0o1600))
print(call((64, 190), 0, 1, 0o1600))
print(call((240, 180), b"queue", 0o102, 0o600, None))
print(call((294, 26), 0))
print(call((141, 140), 2, 0, 19))
for family in (16, 40):
    try:
        socket.socketpair(family)
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


async def test_nothing_outlives_an_execution_but_files(box: Sandbox) -> None:
    result = await box.run_python(_UNNAMED)
    denied = ["EPERM"] * 4 + ["ENOSYS", "EPERM"] + ["EAFNOSUPPORT"] * 2
    assert result.stdout.decode().split() == denied, result


async def test_multiprocessing_works_without_them(box: Sandbox) -> None:
    code = """
from multiprocessing import Lock, Pool, shared_memory
def double(number):
    return 2 * number
if __name__ == "__main__":
    memory = shared_memory.SharedMemory(create=True, size=100)
    with Lock(), Pool(2) as pool:
        print(sum(pool.map(double, range(10))))
    memory.close()
    memory.unlink()
"""
    await box.write_file("/workspace/pool.py", code.encode())
    result = await box.exec(["python3", "pool.py"])
    assert result.stdout == b"90\n", result
