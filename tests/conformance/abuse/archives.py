"""Attempts 12 and 13: archives that lead out of the box, and archives that are larger than they look."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

from tests.conformance.abuse.scene import Scene, attempt, raises_os_error

_MB = 1 << 20


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, mode
    if kind == tarfile.CHRTYPE:
        member.devmajor, member.devminor = 1, 3
    member.size = 4 if kind == tarfile.REGTYPE else 0
    return member


def _archive(*members: tarfile.TarInfo) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"evil"))
    return data.getvalue()


def _bad_archives(folder: Path) -> dict[str, bytes]:
    up = f"..{12 * '/..'}{folder}"
    return {
        "absolute": _archive(_member(f"{folder}/absolute")),
        "dots": _archive(_member(f"{up}/dots")),
        "dots inside": _archive(_member(f"a/../../../../..{folder}/inside")),
        "link out": _archive(_member("out", tarfile.SYMTYPE, str(folder))),
        "through a link": _archive(_member("out", tarfile.SYMTYPE, str(folder)), _member("out/through")),
        "through a relative link": _archive(_member("out", tarfile.SYMTYPE, up), _member("out/through")),
        "through two links": _archive(
            _member("a", tarfile.DIRTYPE, mode=0o755),
            _member("a/b", tarfile.SYMTYPE, "."),
            _member("a/b/c", tarfile.SYMTYPE, ".." + up),
            _member("a/c/through"),
        ),
        "hard link out": _archive(_member("hard", tarfile.LNKTYPE, "/etc/passwd"), _member("hard")),
        "hard link to a link": _archive(_member("s", tarfile.SYMTYPE, str(folder)), _member("h", tarfile.LNKTYPE, "s")),
        "device": _archive(_member("device", tarfile.CHRTYPE)),
    }


async def _tar_is_fooled(scene: Scene) -> None:
    target = scene.folder / "target"
    for path in (target, scene.folder / "inner"):
        path.mkdir()
    for data in _bad_archives(target).values():
        command = ["tar", "--absolute-names", "-xf", "-"]
        subprocess.run(command, input=data, cwd=scene.folder / "inner", stderr=subprocess.DEVNULL, timeout=20)
    assert {"absolute", "dots", "through"} <= set(os.listdir(target))


@attempt(12, "evil-archives", control=_tar_is_fooled)
async def _(scene: Scene) -> bool:
    for name, data in _bad_archives(scene.folder).items():
        assert await raises_os_error(scene.box.put_tree(data), 10.0), name
    await scene.box.put_tree(_archive(_member("setuid", mode=0o6755), _member("dir", tarfile.DIRTYPE, mode=0o7777)))
    for name, data in {"no archive": b"nonsense" * 99, "cut": _archive(_member("x"))[:520], "nul": b"\0" * 99}.items():
        with contextlib.suppress(OSError):
            await scene.box.put_tree(data)
        assert (await scene.box.exec(["true"])).is_ok, name
    found = await scene.box.exec(["find", ".", "-mindepth", "1", "-perm", "/7000"])
    assert (found.stdout, found.stderr) == (b"", b""), found
    return not any(scene.folder.iterdir())


def _bomb(size: int) -> bytes:
    data = io.BytesIO()
    with gzip.open(data, "wb", compresslevel=6) as packed:
        member = _member("zeros")
        member.size = size
        packed.write(member.tobuf())
        for _ in range(size // _MB):
            packed.write(bytes(_MB))
    return data.getvalue()


def _header_bomb(size: int) -> bytes:
    """A file of four bytes whose extended header is this long, and valid."""
    start = b"%d comment=" % size
    data = io.BytesIO()
    with gzip.open(data, "wb", compresslevel=6) as packed:
        header = _member("headers", tarfile.XHDTYPE)
        header.size = size
        packed.write(header.tobuf(tarfile.USTAR_FORMAT) + start)
        rest = size - len(start) - 1
        for at in range(0, rest, _MB):
            packed.write(b"x" * min(_MB, rest - at))
        packed.write(b"\n" + _member("file").tobuf(tarfile.USTAR_FORMAT) + b"evil".ljust(512, b"\0") + bytes(1024))
    return data.getvalue()


_UNPACK = """
def peak():  # not ru_maxrss, which counts from the process that started this one
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
before = peak()
import tarfile
total = 0
with tarfile.open(told["name"]) as archive:
    for member in archive:
        source = archive.extractfile(member)
        while piece := source.read(1 << 20):
            total += len(piece)
said["bytes"] = total
said["memory"] = (peak() - before) << 10
"""


async def _bombs_grow(scene: Scene) -> None:
    """Unpacked without a cap, one fills the disk and the other the memory, five hundred times its size."""
    bombs = {"bytes": _bomb(128 * _MB), "memory": _header_bomb(200 * _MB)}
    for grows, bomb in bombs.items():
        path = scene.folder / grows
        path.write_bytes(bomb)
        assert scene.ask_plainly(_UNPACK, name=str(path))[grows] > 500 * len(bomb)


@attempt(13, "archive-bombs", control=_bombs_grow)
async def _(scene: Scene) -> bool:
    bombs = [_bomb(128 * _MB), *(_header_bomb(size * _MB) for size in (100, 200, 600))]
    for number, bomb in enumerate(bombs):
        assert len(bomb) < _MB
        # the cap's own words: what runs out of memory, or dies of it, was not capped
        assert await raises_os_error(scene.box.put_tree(bomb), 30.0, "bytes"), number
        assert (await scene.box.exec(["true"])).is_ok, number
    assert (await scene.box.exec(["sh", "-c", "rm -rf ./*; truncate -s 60M sparse"])).is_ok
    assert await raises_os_error(scene.box.get_tree(max_bytes=_MB), 10.0, "bytes")
    assert (await scene.box.run_python("for n in range(1001): open(f'f{n}', 'w').close()")).is_ok
    assert await raises_os_error(scene.box.get_tree(max_files=1000), 10.0, "files")
    return (await scene.box.exec(["true"])).is_ok
