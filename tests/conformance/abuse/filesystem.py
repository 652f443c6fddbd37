"""Attempts 1 to 8, 10, 15 and 16: the host's files, the box's own userland, disks, links, what the last box left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from palaestra.sandboxes import Capability, Ended
from palaestra.sandboxes._rootfs import ensure_rootfs
from tests.conformance.abuse.scene import DONE, PLACES, REFUSED, Scene, attempt
from tests.sandboxes.engines import ask, containers

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
    if scene.marker in str(said.get("text")):
        return False
    assert {said[path] for path in paths} <= {"ENOENT", "EACCES"}, said  # each was really tried
    return True


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
_WHERE = """
import json, sys
said["programs"] = ["/usr/bin/python3", json.__file__, sys.executable, "/etc/passwd"]
said["programs"] += [os.path.realpath(path) for path in said["programs"]]
"""


@attempt(3, "change-the-userland", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    if scene.is_unsafe:  # what stands for the machine's own files
        paths = [str(scene.folder / name) for name in ("passwd", "json.py")]
        said = await scene.ask(_OVERWRITE, paths=paths, mark=f"# {scene.marker}")
        return DONE not in said.values()
    programs = (await scene.ask(_WHERE))["programs"]
    new = ["/usr/bin/new", "/new", "/dev/new", "/palaestra/new"]
    paths = [*programs, *new, "/palaestra/seccomp.bpf"]
    before = _userland(scene)
    said = await scene.ask(_OVERWRITE, paths=paths, mark=f"# {scene.marker}")
    after = await scene.make()
    for path in {os.path.realpath(path) for path in programs}:
        assert scene.marker.encode() not in await after.read_file(path, max_bytes=64 * _MB)
    for path in new:
        with pytest.raises(FileNotFoundError):
            await after.read_file(path)
    if _userland(scene) != before or DONE in said.values():
        return False
    assert set(said.values()) <= {"EROFS", "EACCES"}, said
    return True


def _userland(scene: Scene) -> str:
    """A digest of what the host sees of the box's userland: the shared tree, and what an engine says was changed."""
    digest = hashlib.sha256()
    for path in sorted(ensure_rootfs().path.rglob("*")):
        status = path.lstat()
        digest.update(f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    changed = {
        change["Path"]
        for container in containers(owned=True)
        if container.owner_pid == os.getpid()
        for change in ask(container.engine, f"/containers/{container.id}/changes") or ()
    }
    digest.update(str(sorted(changed - {"/etc"})).encode())  # an engine mounts files of its own there
    return digest.hexdigest()


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
