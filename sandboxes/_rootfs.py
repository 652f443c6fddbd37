"""The userland of every box: this machine's Python, a shell and the core utilities, copied to a tree of their own.

Needs no network. Invariants: a tree is keyed by what it is made of, appears under its name only when complete, is
never changed afterwards, and not removed while a jail holds it; every mount point exists in it, because making one
later could follow a link that an agent planted. All of it is readable by every user and writable by none but its
owner.
"""

from __future__ import annotations

import compileall
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._seccomp import filter_program

PYTHON = "/usr/bin/python3"
_FORMAT = "6"
_PARTIAL_S = 3600.0
_UNUSED_S = 86_400.0  # what another checkout of this machine uses in turn is not built again each time
_TREE = re.compile(r"[0-9a-f]{16}")
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

    def hold(self) -> int:
        """A descriptor that keeps the tree from being removed as an old one until it is closed.

        Raises `SandboxError` when that has just happened.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise SandboxError(f"the sandbox userland has gone ({error}); try again") from error


def ensure_rootfs() -> Rootfs:
    """The tree for this interpreter and machine, built on first use (about two seconds, 70 MB).

    Raises `ConfigError` when the machine lacks what a tree is made of. The builder removes what killed builders left,
    and trees that no jail holds and nobody asked for lately.
    """
    programs = _find_programs()
    digest = _digest(programs)
    cache = cache_folder() / "rootfs"
    target = cache / digest
    try:
        if not target.is_dir():
            _make_open_folder(cache)
            with (cache / "build.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.is_dir():
                    _remove_old(cache, digest)
                    _build(cache, target, programs)
        with contextlib.suppress(OSError):  # another user's, or read-only: then nobody removes it
            os.utime(target)  # when it was asked for last
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"cannot build the sandbox userland in {cache}: {_first_reason(error)}; "
            "free 100 MB there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return Rootfs(target, digest)


def _first_reason(error: Exception) -> str:
    """One reason, where the copy of a tree tells one for each of its thousands of files."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return " ".join(str(error).split())


def _make_open_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, for root readable by the jail's user whatever the umask is."""
    if folder.is_dir():
        missing = [folder, folder.parent]  # ours, perhaps made under such a umask
    else:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            path.chmod(0o755)


def _remove_old(cache: Path, digest: str) -> None:
    """Remove partial trees, and whole ones that nobody holds; called under the builders' lock."""
    for partial in cache.glob(".*-*"):
        is_ours = partial.name.startswith(f".{digest}-")
        if is_ours or _age_s(partial) > _PARTIAL_S:  # a builder of an older version has another lock
            shutil.rmtree(partial, ignore_errors=True)
    for tree in cache.iterdir():
        if _TREE.fullmatch(tree.name) and tree.name != digest and _age_s(tree) > _UNUSED_S:
            _remove_unheld(tree)


def _remove_unheld(tree: Path) -> None:
    with contextlib.suppress(OSError):  # held, or another user's
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = tree.rename(tree.with_name(f".{tree.name}-old"))
        finally:
            os.close(fd)
        shutil.rmtree(gone, ignore_errors=True)
        tree.with_name(f"{tree.name}.lock").unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


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
        _set_modes(building)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _set_modes(root: Path) -> None:
    """Whatever the umask and the modes of the sources are: all may read, none but the owner may write, nothing more."""
    for folder, names, files in os.walk(root):
        for name in (".", *names, *files):
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode):
                os.chmod(path, 0o755 if stat.S_ISDIR(mode) or mode & 0o100 else 0o644)


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
