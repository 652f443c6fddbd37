"""The warm parent of all jails: forks a box into namespaces of its own in a few milliseconds.

It runs inside one bubblewrap jail (immutable root, no capability, no network) and never runs agent code.
Each box is a fork of it with its own user, mount, pid, network, ipc, uts and cgroup namespace and its own
`/workspace`, `/tmp`, `/dev/shm` and `/proc`. Invariant: when the zygote ends, so does every box, because they
live below its pid namespace.

Standard library only. Protocol, on a SEQPACKET socket: the host sends a JSON request with the box's socket
attached; the answer is `{"id": n, "pid": p}` with a pidfd of the box's pid 1 attached, or `{"id": n, "error": text}`.
When a box ends the host is told `{"ended": p, "status": s}` with the wait status of its pid 1.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import sys
from typing import Any, NoReturn

from palaestra.sandboxes import _exec_server
from palaestra.sandboxes._channel import Channel
from palaestra.sandboxes._execution import check, child_deaths, forget_child_deaths, libc
from palaestra.sandboxes._warm_python import preload

_CLONE_NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_PR_CAPBSET_DROP = 24
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_CAP_VERSION = 0x20080522
_AGENT = 1000


def main(control_fd: int) -> None:
    """Answer requests until the host closes the control socket."""
    if os.getpid() != 1:
        sys.exit("the zygote must be pid 1 of its own namespace")
    control = socket.socket(fileno=control_fd)
    preload()
    deaths = child_deaths()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(deaths, select.POLLIN)
    makers: set[int] = set()
    control.send(b'{"ready": true}')
    while True:
        for fd, _ in poll.poll():
            if fd == deaths:
                os.read(deaths, 1 << 12)
                _reap(control, makers)
                continue
            data, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not data:
                return
            request = json.loads(data)
            try:
                pid = os.fork()
            except OSError as error:  # the host is short of something now; the boxes that live must go on
                control.send(json.dumps({"id": request["id"], "error": str(error)}).encode())
            else:
                if pid == 0:
                    _make_box(control, fds[0], request)
                makers.add(pid)
            os.close(fds[0])


def _reap(control: socket.socket, makers: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if pid in makers:
            makers.discard(pid)
        else:
            control.send(json.dumps({"ended": pid, "status": status}).encode())


def _make_box(control: socket.socket, box_fd: int, request: dict[str, Any]) -> NoReturn:
    """In a child: make the namespaces, fork the box's pid 1 into them, hand its pidfd to the host, end."""
    try:
        forget_child_deaths()
        check(libc.unshare(_CLONE_NEW), "unshare")
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_AGENT} {_AGENT} 1")
        _write("/proc/self/gid_map", f"{_AGENT} {_AGENT} 1")
        pid = os.fork()
        if pid == 0:
            _inhabit(control, box_fd, request["config"])
        socket.send_fds(control, [json.dumps({"id": request["id"], "pid": pid}).encode()], [os.pidfd_open(pid)])
        os._exit(0)
    except OSError as error:
        control.send(json.dumps({"id": request["id"], "error": str(error)}).encode())
        os._exit(1)


def _inhabit(control: socket.socket, box_fd: int, config: dict[str, Any]) -> NoReturn:
    """As pid 1 of the box: mount what is its own, give up every privilege, serve."""
    control.close()
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    channel = Channel(box_fd, box_fd)
    try:
        _mount_all(config)
        check(libc.sethostname(b"sandbox", 7), "sethostname")
        _raise_loopback()
        _drop_capabilities()
        os.chdir("/workspace")
        _exec_server.harden()
    except OSError as error:
        channel.send({"fatal": str(error)})
        os._exit(1)
    _exec_server.Server(channel, config).serve()


def _mount_all(config: dict[str, Any]) -> None:
    hard = _NOSUID | _NODEV
    size = f"size={config['workspace_mb']}m,nr_inodes={config['inodes']}"
    _mount("proc", "/proc", hard | _NOEXEC, "")
    _mount("devpts", "/dev/pts", _NOSUID | _NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    _mount("tmpfs", "/workspace", hard, f"{size},mode=0755,uid={_AGENT},gid={_AGENT}")
    _mount("tmpfs", "/tmp", hard, f"{size},mode=1777")
    _mount("tmpfs", "/dev/shm", hard | _NOEXEC, f"{size},mode=1777")


def _mount(kind: str, target: str, flags: int, data: str) -> None:
    result = libc.mount(kind.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(result, f"mount {target}")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _drop_capabilities() -> None:
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break  # beyond the kernel's last capability
    header = struct.pack("Ii", _CAP_VERSION, 0)
    check(libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))), "capset")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main(int(sys.argv[1]))
