"""The userland of every box: this machine's Python, a shell and the core utilities, copied to a tree of their own.

Needs no network. Invariants: a tree is keyed by what it is made of, appears under its name only when complete,
and is never changed afterwards; every mount point exists in it, because making one later could follow a link
that an agent planted. All of it is readable by every user and writable by none but its owner.
"""

from __future__ import annotations

import compileall
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from palaestra.errors import ConfigError
from palaestra.sandboxes._seccomp import filter_program

PYTHON = "/usr/bin/python3"
_FORMAT = "5"
_HERE = Path(__file__).resolve().parent
_SERVER_FILES = tuple(
    f"_{name}.py"
    for name in ("channel", "exec_server", "execution", "relay", "spare", "trees", "warm_python", "zygote")
)
_MOUNT_POINTS = ("proc", "dev", "sys", "tmp", "workspace", "run")
_PROGRAMS = """
    bash sh [ arch awk base32 base64 basename cat chmod chown cksum cmp comm cp csplit cut date dd df diff dir dirname
    du echo egrep env expand expr factor false fgrep find fmt fold grep groups gunzip gzip head hostname id install join
    kill link ln logname ls md5sum mkdir mkfifo mknod mktemp mv nice nl nohup nproc numfmt od paste patch pathchk pr
    printenv printf ps ptx pwd readlink realpath rm rmdir sed seq setsid sha1sum sha256sum sha512sum shred shuf sleep
    sort split stat stdbuf stty sum sync tac tail tar tee test timeout touch tr true truncate tsort tty uname unexpand
    uniq unlink users vdir wc which whoami xargs yes zcat
"""
_SKIPPED_MODULES = (
    "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3",
    "config-*", "*.a", "*.opt-?.pyc", "_tkinter*", "_test*", "_ctypes_test*", "_xx*", "pydoc_data", "msilib",
)  # fmt: skip
_FILES = {
    "etc/passwd": "root:x:0:0:root:/:/bin/sh\nagent:x:1000:1000:agent:/workspace:/bin/bash\n",
    "etc/group": "root:x:0:\nagent:x:1000:\n",
    "etc/hosts": "127.0.0.1 localhost sandbox\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


class Rootfs(NamedTuple):
    """A finished tree and the digest of what it was made from."""

    path: Path
    digest: str


def ensure_rootfs() -> Rootfs:
    """The tree for this interpreter and machine, built on first use (about two seconds, 70 MB).

    Raises `ConfigError` when the machine lacks what a tree is made of.
    """
    programs = _find_programs()
    digest = _digest(programs)
    cache = cache_folder() / "rootfs"
    target = cache / digest
    try:
        if target.is_dir():
            return Rootfs(target, digest)
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _build(cache, target, programs)
    except OSError as error:
        raise ConfigError(f"cannot build the sandbox userland in {cache}: {error}; set XDG_CACHE_HOME") from error
    return Rootfs(target, digest)


def cache_folder() -> Path:
    """Where Palaestra caches; for root a place that an unprivileged user can read. Raises `ConfigError`."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base).absolute() if base else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(f"no place for a cache ({error}); set HOME or XDG_CACHE_HOME") from error
    if os.geteuid() == 0 and not _is_open_to_all(folder):
        folder = Path("/var/cache")
    return folder / "palaestra"


def _is_open_to_all(folder: Path) -> bool:
    try:
        existing = [path for path in (folder, *folder.parents) if path.exists()]
        return all(path.stat().st_mode & 0o001 for path in existing)
    except OSError:
        return False


def _find_programs() -> dict[str, Path]:
    found = {name: shutil.which(name, path="/usr/bin:/bin:/usr/local/bin") for name in _PROGRAMS.split()}
    programs = {name: Path(path).resolve() for name, path in found.items() if path}
    for name in ("bash", "sh", "cat"):
        if name not in programs:
            raise ConfigError(f"no {name!r} on this machine to copy into the sandbox; install bash and coreutils")
    return programs


def _digest(programs: dict[str, Path]) -> str:
    parts = [_FORMAT, sys.version, sys.base_prefix, repr(sorted(_FILES.items())), filter_program().hex()]
    for path in (_interpreter(), *programs.values()):
        info = path.stat()
        parts.append(f"{path} {info.st_size} {info.st_mtime_ns}")
    parts += [(_HERE / name).read_text() for name in _SERVER_FILES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _interpreter() -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in (f"python{version}", "python3"):
        path = Path(sys.base_prefix, "bin", name)
        if path.exists():
            return path.resolve()
    return Path(os.path.realpath(sys.executable))


def _build(cache: Path, target: Path, programs: dict[str, Path]) -> None:
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    try:
        _lay_out(building)
        _copy_python(building)
        for name, path in programs.items():
            shutil.copy2(path, building / "usr/bin" / name)
        _copy_libraries(building)
        _copy_server(building)
        os.chmod(building, 0o755)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _lay_out(root: Path) -> None:
    for name in ("usr/bin", "usr/lib", "usr/lib64", "etc", "var", "palaestra/palaestra/sandboxes", *_MOUNT_POINTS):
        (root / name).mkdir(parents=True)
    (root / "dev/shm").mkdir()
    (root / "dev/pts").mkdir()
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "sbin").symlink_to("usr/bin")
    (root / "var/tmp").symlink_to("/tmp")
    for name, text in _FILES.items():
        (root / name).write_text(text)


def _copy_python(root: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    stdlib = root / "usr/lib" / version
    source = sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix})
    shutil.copytree(source, stdlib, ignore=shutil.ignore_patterns(*_SKIPPED_MODULES), symlinks=False)
    compileall.compile_dir(str(stdlib), quiet=2, stripdir=str(root))
    binary = root / "usr/bin" / version
    shutil.copy2(_interpreter(), binary)
    for name in ("python3", "python"):
        (root / "usr/bin" / name).symlink_to(version)


def _copy_server(root: Path) -> None:
    package = root / "palaestra/palaestra"
    (package / "__init__.py").touch()
    (package / "sandboxes/__init__.py").touch()
    for name in _SERVER_FILES:
        shutil.copy(_HERE / name, package / "sandboxes" / name)
    compileall.compile_dir(str(package), quiet=2, stripdir=str(root))
    program = filter_program()
    if program:
        (root / "palaestra/seccomp.bpf").write_bytes(program)


def _copy_libraries(root: Path) -> None:
    """Copy what the copied binaries link to: system libraries to their own place, the others beside libc."""
    binaries = [path for path in (root / "usr").rglob("*") if not path.is_symlink() and _is_elf(path)]
    libraries = _linked(binaries)
    system = next((path.parent for path in libraries if path.name.startswith("libc.")), Path("/usr/lib"))
    for path in libraries:
        folder = path.parent if _is_system(path) else system
        target = root / folder.relative_to("/") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy2(path, target)


def _is_system(path: Path) -> bool:
    return str(path).startswith(("/lib", "/usr/lib"))


def _is_elf(path: Path) -> bool:
    if not path.is_file() or path.suffix in (".py", ".pyc"):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _linked(binaries: Iterable[Path]) -> set[Path]:
    command = ["ldd", *map(str, binaries)]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except FileNotFoundError as error:
        raise ConfigError("no 'ldd' on this machine; install libc-bin") from error
    return {Path(match) for match in re.findall(r"(?:=>|^)\s+(/\S+)\s+\(0x", listing, re.MULTILINE)}
