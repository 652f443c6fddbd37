"""Attempts 46 to 53: namespaces, mounts, keyrings, rare system calls and sockets, terminals, devices, privileges.

A call gets arguments with which the kernel itself refuses it, without harm, once it has let it in: so the refusal
of a box (EPERM, ENOSYS, EAFNOSUPPORT) is told from the kernel's own (EFAULT, EBADF, EINVAL), which is the control.
Numbers are (x86_64, aarch64), written down apart from those that the filter is made of.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from palaestra.sandboxes import Capability
from tests.conformance.abuse.scene import DONE, REFUSED, Scene, attempt


def _is_let_in(said: dict[str, str]) -> list[str]:
    return sorted(name for name, outcome in said.items() if outcome not in REFUSED)


async def _no_call_is_let_in(scene: Scene, code: str, *, for_root: frozenset[str] = frozenset(), **told: Any) -> bool:
    """Whether the box refuses every call; without isolation the kernel takes each but what only root may call."""
    said = await scene.ask(code, **told)
    if scene.is_unsafe:
        excused = set(for_root if os.geteuid() else ()) | {name for name in said if said[name] == "ENOSYS"}
        assert set(_is_let_in(said)) >= set(said) - excused, said
        assert 2 * len(_is_let_in(said)) > len(said), said  # a kernel may lack a few
        return False
    return not _is_let_in(said)


_NAMESPACES = """
flags = {"time": 0x80, "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000,
         "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
def clone(flag):
    # the ids are those that no clone without a new namespace takes: CLONE_THREAD wants CLONE_VM, and is refused
    call((56, 220), flag | 0x10000, 0, 0, 0, 0)
for name, flag in flags.items():
    attempt(f"clone {name}", lambda: clone(flag))
    attempt(f"unshare {name}", lambda: call((272, 97), flag | (1 << 63) - (1 << 32)))
own = {"mnt": 0x20000, "net": 0x40000000, "pid": 0x20000000, "user": 0x10000000, "uts": 0x4000000, "ipc": 0x8000000}
for kind, flag in own.items():
    # into its own, of which it has a descriptor: where that is let in, it changes nothing
    fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
    attempt(f"setns {kind}", lambda: call((308, 268), fd, flag))
attempt("clone3", lambda: call((435, 435), None, 0))
"""
_ENTER = """
def enter():
    if os.fork() == 0:
        try:
            call((272, 97), 0x10000000)
            os._exit(0)
        except OSError:
            os._exit(1)
    if os.wait()[1]:
        raise PermissionError(errno.EPERM, "")
attempt("new user namespace", enter)
"""


@attempt(46, "new-namespaces", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    return await _no_call_is_let_in(scene, _NAMESPACES + _ENTER)


_MOUNTS = """
attempt("mount", lambda: call((165, 40), None, None, None, 0, None))
attempt("umount2", lambda: call((166, 39), None, 0))
attempt("pivot_root", lambda: call((155, 41), None, None))
attempt("chroot", lambda: call((161, 51), None))
attempt("open_tree", lambda: call((428, 428), -1, None, 0))
attempt("move_mount", lambda: call((429, 429), -1, None, -1, None, 0))
attempt("fsopen", lambda: call((430, 430), None, 0))
attempt("fsconfig", lambda: call((431, 431), -1, 0, None, None, 0))
attempt("fsmount", lambda: call((432, 432), -1, 0, 0))
attempt("fspick", lambda: call((433, 433), -1, None, 0))
attempt("mount_setattr", lambda: call((442, 442), -1, None, 0, None, 0))
"""


@attempt(47, "mount-and-change-root", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    for_root = frozenset({"pivot_root", "open_tree", "move_mount", "fsopen", "fsmount", "fspick", "mount_setattr"})
    return await _no_call_is_let_in(scene, _MOUNTS, for_root=for_root)


_ADD_KEY = """
payload = told["mark"].encode()
attempt("add", lambda: call((248, 217), b"user", payload, payload, len(payload), told["ring"]))
"""
_FIND_KEY = """
def find():
    key = call((250, 219), 10, told["ring"], b"user", told["mark"].encode(), 0)
    call((250, 219), 3, key)
attempt("find", find)
attempt("request", lambda: call((249, 218), b"user", told["mark"].encode(), None, 0))
"""


@attempt(48, "keyring-of-the-user", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    rings = (-4, -5)  # the user's, and that of its sessions
    said: dict[str, str] = {}
    other = await scene.make()
    for ring in rings:
        told: dict[str, Any] = {"mark": scene.marker, "ring": ring}
        added = await scene.ask(_ADD_KEY, **told)
        found = await scene.ask(_FIND_KEY, box=other, **told)
        assert not scene.is_unsafe or (added["add"], found["find"]) == (DONE, DONE)
        said |= {f"{name} {ring}": outcome for name, outcome in (added | found).items()}
    return not _is_let_in(said)


_RARE = """
attempt("bpf", lambda: call((321, 280), 0, None, 0))
attempt("perf_event_open", lambda: call((298, 241), None, 0, 0, -1, 0))
attempt("userfaultfd", lambda: call((323, 282), 1 << 20))
attempt("io_uring_setup", lambda: call((425, 425), 1, None))
attempt("io_uring_enter", lambda: call((426, 426), -1, 0, 0, 0, None, 0))
attempt("io_uring_register", lambda: call((427, 427), -1, 0, None, 0))
attempt("name_to_handle_at", lambda: call((303, 264), -1, None, None, None, 0))
attempt("open_by_handle_at", lambda: call((304, 265), -1, None, 0))
attempt("fanotify_init", lambda: call((300, 262), -1, 0))
attempt("quotactl", lambda: call((179, 60), -1, None, 0, None))
attempt("kexec_load", lambda: call((246, 104), 0, 0, None, -1))
attempt("init_module", lambda: call((175, 105), None, 0, None))
attempt("finit_module", lambda: call((313, 273), -1, None, 0))
attempt("syslog", lambda: call((103, 116), -1, None, 0))
attempt("adjtimex", lambda: call((159, 171), None))
attempt("clock_settime", lambda: call((227, 112), 0, None))
attempt("settimeofday", lambda: call((164, 170), 1, 1))
attempt("acct", lambda: call((163, 89), b"/nonexistent/file"))
attempt("swapon", lambda: call((167, 224), b"/nonexistent/file", 0))
attempt("process_vm_readv", lambda: call((310, 270), os.getpid(), None, 0, None, 0, -1))
attempt("kcmp", lambda: call((312, 272), os.getpid(), os.getpid(), -1, 0, 0))
attempt("move_pages", lambda: call((279, 239), 0, 1, None, None, None, 0))
attempt("prlimit of the server", lambda: call((302, 261), os.getppid(), -1, None, None))
"""


_FOR_ROOT = """
bpf perf_event_open userfaultfd io_uring_setup open_by_handle_at fanotify_init quotactl kexec_load
init_module finit_module syslog clock_settime settimeofday acct swapon
"""


@attempt(49, "rare-system-calls", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    return await _no_call_is_let_in(scene, _RARE, for_root=frozenset(_FOR_ROOT.split()))


_FAMILIES = """
import ctypes, mmap
names = {16: "netlink", 17: "packet", 29: "can", 31: "bluetooth", 38: "alg", 40: "vsock", 44: "xdp", 30: "tipc"}
for family, name in names.items():
    attempt(name, lambda: socket.socket(family, socket.SOCK_RAW if family in (16, 17) else socket.SOCK_SEQPACKET))
attempt("raw ip", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("personality", lambda: call((135, 92), 0x0040000))
if platform.machine() == "x86_64":
    # mov eax, 20 (getpid of a 32-bit program); int 0x80; ret
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex("b814000000cd80c3"))
    entry = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    pid = os.fork()
    if pid == 0:
        os._exit(entry() != os.getpid())
    said["32-bit"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    attempt("x32", lambda: call(0x40000000 + 39))
"""


@attempt(50, "rare-sockets-and-calls-of-other-machines", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_FAMILIES)
    other_width = said.pop("32-bit", -31)
    let_in = _is_let_in(said)
    if scene.is_unsafe:  # the rest needs modules that this kernel may lack
        assert {"netlink", "personality"} <= set(let_in)
        assert os.geteuid() or {"packet", "raw ip"} <= set(let_in)
        return False
    assert set(said) >= {"netlink", "packet", "alg", "vsock", "raw ip", "personality"}
    return not let_in and other_width == -31  # SIGSYS


_TERMINAL = """
import fcntl, pty
primary, secondary = os.openpty()
for name, request in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C)):
    for high in (0, 1 << 32):
        attempt(f"{name} {high}", lambda: call((16, 29), secondary, request | high, b"x"))
os.set_blocking(primary, False)
attempt("own terminal", lambda: os.close(os.open("/dev/tty", os.O_RDWR)))
said["own terminal"] = "EPERM" if said["own terminal"] == "ENXIO" else said["own terminal"]
"""


@attempt(51, "type-into-a-terminal", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_TERMINAL)
    assert said.pop("own terminal") == "EPERM"  # no back end leaves one
    let_in = _is_let_in(said)
    assert not scene.is_unsafe or len(let_in) == len(said)
    return not let_in


_DEVICES = """
def write(path):
    os.close(os.open(path, os.O_WRONLY))  # and nothing is written
for path in told["paths"]:
    attempt(path, lambda: write(path))
attempt("node", lambda: os.mknod("node", 0o20666, os.makedev(1, 3)))
attempt("disk", lambda: os.mknod("disk", 0o60666, os.makedev(254, 0)))
"""


@attempt(52, "kernel-settings-and-devices", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    paths = ["/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger"]
    if not scene.is_unsafe:
        paths += ["/proc/sys/kernel/core_pattern", "/proc/sys/net/ipv4/ip_forward", "/proc/kcore", "/dev/mem"]
        paths += ["/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop-control"]
        paths += ["/dev/fuse", "/dev/net/tun", "/dev/kvm", "/sys/kernel/uevent_helper", "/proc/1/oom_score_adj"]
        paths += ["/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/cgroup.procs"]
    elif os.geteuid():
        pytest.skip("only root may write to these without isolation")
    said = await scene.ask(_DEVICES, paths=paths)
    if scene.is_unsafe:
        assert set(said.values()) <= {DONE, "ENOENT"}, said
        assert (said["node"], said["/proc/sys/kernel/hostname"]) == (DONE, DONE)
    return set(said.values()) <= REFUSED | {"ENOENT"}


_PRIVILEGES = """
import pwd, shutil, stat
said["status"] = open("/proc/self/status").read()
attempt("setuid", lambda: os.setuid(0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("chown", lambda: (open("mine", "w").close(), os.chown("mine", 4242, 4242)))
said["setuid programs"] = []
for folder in ("/bin", "/usr/bin", "/usr/lib", "/palaestra") if not told["is_unsafe"] else ():
    for parent, _, files in os.walk(folder):
        for name in files:
            if os.lstat(os.path.join(parent, name)).st_mode & 0o6000:
                said["setuid programs"].append(name)
"""


@attempt(53, "privileges", Capability.KERNEL)
async def _(scene: Scene) -> bool:
    said = await scene.ask(_PRIVILEGES, is_unsafe=scene.is_unsafe)
    fields = dict(line.partition(":")[::2] for line in said.pop("status").splitlines())
    no_capability = all(int(fields[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
    is_closed = (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")
    assert said.pop("setuid programs") == []
    if scene.is_unsafe:
        assert os.geteuid() or set(said.values()) == {DONE}
        return no_capability and is_closed
    assert fields["Uid"].split() == fields["Gid"].split() == ["1000"] * 4
    return no_capability and is_closed and DONE not in said.values()
