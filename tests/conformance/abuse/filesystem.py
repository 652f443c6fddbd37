"""Attempts 1 to 16: the host's files, the box's own userland, disks, links, archives, what the last box left."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from palaestra.sandboxes import Capability, Ended, Sandbox
from tests.conformance.abuse.scene import DONE, PLACES, REFUSED, Scene, attempt, proves_itself, raises_os_error

_MB = 1 << 20
_READ = """
def read(path):
    said.setdefault("text", []).append(open(path).read())
for path in told["paths"]:
    attempt(path, lambda: read(path))
"""


async def _reads_nothing(scene: Scene, path: Path) -> bool:
    paths = [str(path), f"/proc/1/root{path}", f"/proc/self/root{path}", f"/workspace/../../..{path}"]
    said = await scene.ask(_READ, paths=paths)
    assert all(path in said for path in paths)  # each was really tried
    return scene.marker not in str(said.get("text"))


@attempt(1, "read-a-host-file", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    secret = scene.folder / "secret"
    secret.write_text(scene.marker)
    secret.chmod(0o644)
    return await _reads_nothing(scene, secret)


@attempt(2, "read-a-private-host-file", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    secret = scene.folder / "secret"
    secret.write_text(scene.marker)
    secret.chmod(0o600)
    return await _reads_nothing(scene, secret)


_OVERWRITE = """
def write(path):
    with open(path, "a") as file:
        file.write(told["mark"])
for path in told["paths"]:
    attempt(path, lambda: write(path))
"""


@attempt(3, "change-the-userland", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    paths = [
        "/etc/passwd",
        "/usr/lib/python3.11/json/__init__.py",
        "/usr/bin/python3",
        "/usr/bin/new",
        "/new",
        "/dev/new",
    ]
    if scene.is_unsafe:  # what stands for the machine's own files
        paths = [str(scene.folder / name) for name in ("passwd", "json.py")]
    else:
        where = "import json, sys; print(json.__file__, sys.executable)"
        paths += (await scene.box.run_python(where)).stdout.decode().split()
        paths += ["/palaestra/seccomp.bpf", "/palaestra/new"]
    said = await scene.ask(_OVERWRITE, paths=paths, mark=f"# {scene.marker}")
    after = await scene.make()
    for path in paths:
        with contextlib.suppress(OSError):
            assert scene.is_unsafe or scene.marker.encode() not in await after.read_file(path, max_bytes=64 * _MB)
    return DONE not in said.values()


_REMOUNT = """
MS_REMOUNT, MS_BIND, MS_PRIVATE = 32, 4096, 1 << 18
target = None if told["is_unsafe"] else b"/"
attempt("remount", lambda: call((165, 40), None, target, None, MS_REMOUNT | MS_BIND, None))
attempt("private", lambda: call((165, 40), None, target, None, MS_PRIVATE, None))
attempt("attributes", lambda: call((442, 442), -1, target, 0, None, 0))
"""


@attempt(4, "remount-the-root-writable", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    # the machine's own root is not named: there it must only come as far as to read the missing name
    said = await scene.ask(_REMOUNT, is_unsafe=scene.is_unsafe)
    return set(said.values()) <= REFUSED


_FILL = """
written = 0
try:
    for number in range(told["files"]):
        with open(f"{told['place']}/{told['mark']}-{number}", "wb", buffering=0) as file:
            for _ in range(told["file_mb"]):
                written += file.write(bytes(1 << 20))
finally:
    print(written, flush=True)
    if told["is_unsafe"]:
        for number in range(told["files"]):
            os.unlink(f"{told['place']}/{told['mark']}-{number}")
"""


async def fills_within_its_size(scene: Scene, place: str) -> bool:
    """Whether files in a place stay below the workspace size; without isolation a little more is tried."""
    files, file_mb = (2, 40) if scene.is_unsafe else (6, 60)
    where = "." if scene.is_unsafe and place == "/workspace" else place
    before = shutil.disk_usage(scene.folder).free
    result = await scene.run(
        _FILL, place=where, mark=scene.marker, files=files, file_mb=file_mb, is_unsafe=scene.is_unsafe
    )
    written = int(result.stdout.split()[0])
    assert written > 32 * _MB
    if scene.is_unsafe:
        return written < files * file_mb * _MB
    assert before - shutil.disk_usage(scene.folder).free < files * file_mb * _MB // 2
    if written > 64 * _MB:
        return False
    assert (result.ended, b"No space left" in result.stderr) == (Ended.DISK, True)
    return True


@attempt(5, "fill-the-workspace", Capability.DISK)
async def _(scene: Scene) -> bool:
    if scene.is_unsafe:
        return await fills_within_its_size(scene, "/workspace")
    return all([await fills_within_its_size(await _alone(scene), place) for place in ("/workspace", "/tmp")])


async def _alone(scene: Scene) -> Scene:
    """The same scene with a new box, since what fills one place counts as memory too."""
    scene.box = await scene.make()
    return scene


@attempt(6, "flood-of-inodes", Capability.INODES)
async def _(scene: Scene) -> bool:
    code = """
count = 0
os.mkdir("flood")
try:
    for count in range(1, told["count"] + 1):
        os.close(os.open(f"flood/{count}", os.O_CREAT | os.O_WRONLY))
except OSError as error:
    said["errno"] = errno.errorcode[error.errno]
said["count"] = count
"""
    free = os.statvfs(scene.folder).f_ffree
    said = await scene.ask(code, count=20_000 if scene.is_unsafe else 200_000)
    assert scene.is_unsafe or free - os.statvfs(scene.folder).f_ffree < 50_000
    return bool(said.get("errno") == "ENOSPC" and 1000 < said["count"] < 20_000)


_SPARSE = """
open("sparse", "w").close()
attempt("a terabyte", lambda: os.truncate("sparse", 1 << 40))
os.truncate("sparse", 0)
"""


async def _makes_a_terabyte(scene: Scene) -> None:
    assert scene.ask_plainly(_SPARSE)["a terabyte"] == DONE


@attempt(7, "a-sparse-terabyte", control=_makes_a_terabyte)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_SPARSE)
    await scene.box.exec(["truncate", "-s", "60M", "large"])
    with pytest.raises(OSError, match="62914560 bytes"):
        await scene.box.read_file("/workspace/large")
    return bool(said["a terabyte"] == "EFBIG")


@attempt(8, "read-through-a-link", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    secret = scene.folder / "secret"
    secret.write_text(scene.marker)
    secret.chmod(0o644)
    made = await scene.box.exec(["sh", "-c", f"ln -s {secret} file; ln -s {scene.folder} folder; ln -s / root"])
    assert made.is_ok
    seen = b""
    for path in ("file", "folder/secret", f"root{secret}", str(secret), "/proc/1/root/etc/hostname"):
        with contextlib.suppress(OSError):
            seen += await scene.box.read_file(path if path.startswith("/") else f"/workspace/{path}")
    with contextlib.suppress(OSError):
        seen += str(await scene.box.get_tree("/workspace/folder")).encode()
    return scene.marker.encode() not in seen


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


@attempt(10, "write-out-of-the-box", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    assert (await scene.box.exec(["ln", "-s", str(scene.folder), "folder"])).is_ok
    up = "/workspace" + 12 * "/.."
    for path in ("/workspace/folder/a", f"{up}{scene.folder}/b", f"{scene.folder}/c"):
        with contextlib.suppress(OSError):
            await scene.box.write_file(path, scene.marker.encode())
    for path in ("/workspace/folder", str(scene.folder)):
        with contextlib.suppress(OSError):
            await scene.box.put_tree({"d": b"x"}, path)
    return not any(scene.folder.iterdir())


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
    """A member whose extended header says, and is, this long."""
    data = io.BytesIO()
    with gzip.open(data, "wb", compresslevel=6) as packed:
        member = _member("headers", tarfile.XHDTYPE)
        member.size = size
        packed.write(member.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(size // _MB):
            packed.write(b"9" * _MB)
    return data.getvalue()


async def _bombs_are_large(scene: Scene) -> None:
    bomb = _bomb(128 * _MB)
    assert len(bomb) * 500 < len(gzip.decompress(bomb))


@attempt(13, "archive-bombs", control=_bombs_are_large)
async def _(scene: Scene) -> bool:
    for bomb in (_bomb(128 * _MB), _header_bomb(600 * _MB)):
        assert len(bomb) < _MB
        assert await raises_os_error(scene.box.put_tree(bomb), 30.0)
    assert (await scene.box.exec(["sh", "-c", "rm -rf ./*; truncate -s 60M sparse"])).is_ok
    assert await raises_os_error(scene.box.get_tree(max_bytes=_MB), 10.0)
    assert (await scene.box.run_python("for n in range(1001): open(f'f{n}', 'w').close()")).is_ok
    assert await raises_os_error(scene.box.get_tree(max_files=1000), 10.0)
    return (await scene.box.exec(["true"])).is_ok


_DEEP = """
for number in range(3000):
    os.mkdir("d")
    os.chdir("d")
said["depth"] = number + 1
"""


@attempt(14, "deep-and-closed-folders", control=proves_itself)
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
        assert time.monotonic() - began_s < 2.0
    return True


_REPLACE = """
for number, place in enumerate(told["places"]):
    attempt(place, lambda: os.rename(place, f"{place}.old"))
    attempt(f"{place} link", lambda: os.symlink(told["target"], place))
for name in ("proc", "dev", "tmp", "workspace", "sys"):
    attempt(f"plant {name}", lambda: os.symlink(told["target"], f"{told['inside']}/{name}"))
"""


@attempt(15, "link-at-a-mount-point", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    said = await scene.ask("said['cwd'] = os.getcwd()")
    places = [said["cwd"]] if scene.is_unsafe else ["/workspace", "/tmp", "/dev/shm", "/proc", "/dev"]
    inside = str(scene.folder / "inside") if scene.is_unsafe else "/workspace"
    if scene.is_unsafe:
        (scene.folder / "inside").mkdir()
    target = scene.folder / "target"
    target.mkdir()
    said = await scene.ask(_REPLACE, places=places, target=str(target), inside=inside)
    assert [said[f"plant {name}"] for name in ("proc", "dev", "tmp", "workspace", "sys")] == [DONE] * 5
    for box in (scene.box, await scene.make()):
        with contextlib.suppress(OSError):
            await box.write_file("/workspace/planted", b"x")
    return not any(target.iterdir())


@attempt(16, "what-the-last-box-left", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    names = [f"{place}/{scene.marker}" for place in PLACES]
    names[0] = f"./{scene.marker}"
    code = 'for name in told["names"]: open(name, "w").write("here")\nos.utime(told["names"][0])'
    await scene.ask(code, names=names)
    await scene.box.aclose()
    look = 'for name in told["names"]: attempt(name, lambda: open(name).close())'
    said = await scene.ask(look, box=await scene.make(), names=names)
    for name in names[1:]:
        Path(name).unlink(missing_ok=True)
    return DONE not in said.values()
