"""Attempts 17 to 21: too many processes and threads, too much memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

from palaestra.sandboxes import Capability, Ended, Sandbox
from tests.conformance.abuse.filesystem import fills_within_its_size
from tests.conformance.abuse.scene import Scene, attempt
from tests.sandboxes.hostview import eventually

_MOST = 64  # the usual limit
_MEANWHILE_S = 3.0
"""How long a bomb lives, so that another box can be seen to answer before its end."""
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
time.sleep(told["meanwhile_s"])
"""
_THREADS = """
libc.prctl(15, told["name"].encode())
threading.stack_size(1 << 18)
count = 0
try:
    while count < told["most"]:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except RuntimeError:
    said["errno"] = "EAGAIN"
said["count"] = count
time.sleep(1.0)
print(json.dumps(said), flush=True)
os._exit(0)
"""
_REAL_BOMB = """
print("lit", flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def named(name: str) -> int:
    """How many processes of the machine call themselves so."""
    return sum(_is_named(entry / "comm", name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _threads_named(name: str) -> int:
    """How many threads of the machine are called so."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_named(entry / "comm", name):
            try:
                count += sum(_is_named(task / "comm", name) for task in (entry / "task").iterdir())
            except OSError:
                continue
    return count


def _is_named(path: Path, name: str) -> bool:
    try:
        return path.read_text().strip() == name
    except OSError:
        return False


async def _works(box: Sandbox) -> bool:
    """Another box can start processes of its own."""
    result = await box.run_python("import os\nif os.fork(): os.wait(); print('two')")
    return result.stdout == b"two\n"


@attempt(17, "fork-bomb", Capability.PROCESSES)
async def _(scene: Scene) -> bool:
    other = await scene.make()
    most = 80 if scene.is_unsafe else 1000
    bomb = asyncio.ensure_future(scene.ask(_BOMB, most=most, name=scene.marker, meanwhile_s=_MEANWHILE_S))
    try:
        assert await eventually(lambda: named(scene.marker) > 32)  # it really runs, and the host sees it
        assert await _works(other)
        counted = named(scene.marker)
        assert counted > 32, "the other box answered only when the bomb was over"
        said = await bomb
    finally:
        bomb.cancel()
    assert await eventually(lambda: named(scene.marker) == 0, 2.0)
    if said.get("errno") != "EAGAIN" or not said["count"] <= _MOST or counted > _MOST:
        return False
    return await _others_answer_while_it_explodes(scene, other)


async def _others_answer_while_it_explodes(scene: Scene, other: Sandbox) -> bool:
    lit = asyncio.Event()
    exploding = asyncio.ensure_future(scene.run(_REAL_BOMB, wall_s=_MEANWHILE_S, on_output=lambda *_: lit.set()))
    try:
        async with asyncio.timeout(10.0):
            await lit.wait()
        assert await _works(other)
        assert not exploding.done(), "the other box answered only when the bomb was over"
        assert (await exploding).ended is Ended.WALL_TIMEOUT
    finally:
        exploding.cancel()
    return (await scene.box.exec(["true"])).is_ok


@attempt(18, "thread-bomb", Capability.PROCESSES)
async def _(scene: Scene) -> bool:
    bomb = asyncio.ensure_future(scene.ask(_THREADS, most=80 if scene.is_unsafe else 1000, name=scene.marker))
    counted = 0
    while not bomb.done():
        counted = max(counted, _threads_named(scene.marker))
        await asyncio.sleep(0.05)
    said = await bomb
    assert counted > 32  # it really ran, and the host saw it
    assert await eventually(lambda: _threads_named(scene.marker) == 0, 2.0)
    return bool(said.get("errno") == "EAGAIN" and said["count"] <= _MOST and counted <= _MOST)


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
