"""Attempts 9, 11 and 14: what is no file, names that are no names, and trees that no recursion can remove."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from palaestra.sandboxes import Sandbox
from tests.conformance.abuse.scene import CLOSE_S, Scene, attempt, raises_os_error


async def _cat_never_ends(scene: Scene) -> None:
    os.mkfifo(scene.folder / "fifo")
    for path in (scene.folder / "fifo", Path("/dev/zero")):
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, timeout=0.5)


@attempt(9, "read-what-is-no-file", control=_cat_never_ends)
async def _(scene: Scene) -> bool:
    code = 'os.mkfifo("fifo"); os.mkdir("folder"); socket.socket(socket.AF_UNIX).bind("socket")'
    await scene.ask(code)
    paths = ["/workspace/fifo", "/workspace/folder", "/workspace/socket", "/dev/zero", "/proc/self/mem"]
    refused = [await raises_os_error(scene.box.read_file(path), 1.0) for path in paths]
    refused += [await raises_os_error(scene.box.write_file(path, b"x"), 1.0) for path in paths]
    assert (await scene.box.get_tree()) == {}  # and none of them is in a tree
    return all(refused)


async def _names_are_cut_at_nul(scene: Scene) -> None:
    code = """
open("cut", "w").close()
fd = libc.open(b"cut\\0 here", os.O_RDONLY)
said["cut"] = os.readlink(f"/proc/self/fd/{fd}")
"""
    assert scene.ask_plainly(code)["cut"] == str(scene.folder / "cut")


def _uses_of(path: str) -> tuple[Callable[[Sandbox], Awaitable[object]], ...]:
    return (
        lambda box: box.read_file(path),
        lambda box: box.write_file(path, b"x"),
        lambda box: box.get_tree(path),
        lambda box: box.put_tree({"x": b""}, path),
    )


@attempt(11, "odd-paths", control=_names_are_cut_at_nul)
async def _(scene: Scene) -> bool:
    box = scene.box
    for name in ("cut\0here", "\0", ""):
        for action in _uses_of(name):
            with pytest.raises(ValueError, match="not a file path"):
                await action(box)
    for name in ("n" * 5000, "n/" * 3000 + "n", "n/" * 1500 + "n", "\ud800"):
        for action in _uses_of(f"/workspace/{name}"):
            assert await raises_os_error(action(box), 5.0), name[:20]
    assert (await box.exec(["sh", "-c", "ls -A; rm -rf n"])).is_ok
    assert not (await box.exec(["true"], cwd="/workspace/" + "n" * 5000)).is_ok
    names = ["new\nline", "not text \udcff\udc80", " ", "-rf", "\x1b[2J", "a" * 255, "\u202egnp.exe"]
    for name in names:
        await box.write_file(f"/workspace/{name}", name.encode(errors="surrogateescape"))
    tree = await box.get_tree()
    other = await scene.make()
    await other.put_tree(tree)
    assert await other.get_tree() == tree
    return tree == {name: name.encode(errors="surrogateescape") for name in names}


_DEEP = """
for number in range(3000):
    os.mkdir("d")
    os.chdir("d")
said["depth"] = number + 1
"""


async def _no_recursion_removes_it(scene: Scene) -> None:
    assert scene.ask_plainly(_DEEP)["depth"] == 3000
    try:
        with pytest.raises(RecursionError):
            shutil.rmtree(scene.folder / "d")
    finally:
        subprocess.run(["rm", "-rf", scene.folder / "d"], check=True)


@attempt(14, "deep-and-closed-folders", control=_no_recursion_removes_it)
async def _(scene: Scene) -> bool:
    closed = await scene.make()
    empty = await closed.snapshot()
    for box, code in ((closed, 'os.makedirs("a/b"); os.chmod("a", 0)'), (scene.box, _DEEP)):
        said = await scene.ask(code, box=box)
        assert box is closed or said["depth"] == 3000
        for action in (box.get_tree, box.snapshot):
            with contextlib.suppress(OSError):  # as root without isolation, nothing is closed
                async with asyncio.timeout(10.0):
                    await action()
        assert (await box.exec(["true"])).is_ok
        await box.restore(empty)
        assert await box.get_tree() == {}
        await scene.ask(code, box=box)
        began_s = time.monotonic()
        await box.aclose()
        assert time.monotonic() - began_s < CLOSE_S
    return True
