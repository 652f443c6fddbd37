"""The system-call filter of every box, as a classic BPF program made without a dependency.

Invariant: the filter only ever removes; what it does not name is decided by the namespaces and the lack of
capabilities. Covers new namespaces, mounts, keyrings, bpf, perf, userfaultfd, io_uring, ptrace, other
architectures' calls, sockets beyond unix and IP, touching another process's limits or scheduling, shared memory and
queues that no file names and that would outlive their processes, and watching the files that boxes share.
Does not cover: bugs in the system calls that stay open.
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import NamedTuple

_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_NEW_NAMESPACES = 0x7E020080  # the CLONE_NEW* flags
_X32_BIT = 0x40000000

# name: (x86_64, aarch64); -1 where the architecture lacks it
_DENIED = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bpf": (321, 280), "chroot": (161, 51),
    "clock_adjtime": (305, 266), "clock_settime": (227, 112), "delete_module": (176, 106),
    "fanotify_init": (300, 262), "finit_module": (313, 273), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fsopen": (430, 430), "fspick": (433, 433), "init_module": (175, 105), "io_uring_enter": (426, 426),
    "mq_open": (240, 180), "msgget": (68, 186), "semget": (64, 190), "shmat": (30, 196), "shmget": (29, 194),
    "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioperm": (173, -1), "iopl": (172, -1),
    "ioprio_set": (251, 30), "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "lookup_dcookie": (212, 18), "migrate_pages": (256, 238), "modify_ldt": (154, -1),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pivot_root": (155, 41),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "reboot": (169, 142), "request_key": (249, 218), "setns": (308, 268),
    "settimeofday": (164, 170), "swapoff": (168, 225), "swapon": (167, 224), "syslog": (103, 116),
    "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282), "vhangup": (153, 58),
}  # fmt: skip
# programs that lack these do without
_ABSENT = {"inotify_init": (253, -1), "inotify_init1": (294, 26)}
_CLONE, _CLONE3, _SOCKET, _IOCTL, _PERSONALITY = (56, 220), (435, 435), (41, 198), (16, 29), (135, 92)
_SOCKETPAIR = (53, 199)
# calls that take a pid first: only 0, the caller itself, is allowed
_SELF_ONLY = {
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
}  # fmt: skip
_SETPRIORITY = (141, 140)
_FAMILIES = (1, 2, 10)  # unix, IPv4, IPv6
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class _Step(NamedTuple):
    code: int
    value: int
    if_true: int = 0
    if_false: int = 0


def filter_program(machine: str | None = None) -> bytes:
    """The filter for this machine's architecture (or `machine`); empty for one that has no table."""
    machine = machine or platform.machine()
    if machine not in _AUDIT:
        return b""
    column = list(_AUDIT).index(machine)
    steps = [_Step(_LOAD, _ARCHITECTURE), _Step(_JUMP_EQUAL, _AUDIT[machine], 1), _Step(_RETURN, _KILL)]
    steps += [_Step(_LOAD, _NUMBER), _Step(_JUMP_ABOVE, _X32_BIT, 0, 1), _fail(errno.ENOSYS)]
    for table, code in ((_DENIED, errno.EPERM), (_ABSENT, errno.ENOSYS)):
        for numbers in table.values():
            if numbers[column] >= 0:
                steps += _when(numbers[column], [_fail(code)])
    # the C library falls back to clone, whose flags a filter can read
    steps += _when(_CLONE3[column], [_fail(errno.ENOSYS)])
    makes_namespace = [_argument(0), _Step(_JUMP_ANY, _NEW_NAMESPACES, 0, 1), _fail(errno.EPERM), _allow()]
    steps += _when(_CLONE[column], makes_namespace)
    for numbers in (_SOCKET, _SOCKETPAIR):
        steps += _when(numbers[column], _only(0, _FAMILIES, errno.EAFNOSUPPORT))
    steps += _when(_PERSONALITY[column], _only(0, (0, 0xFFFFFFFF), errno.EPERM))
    steps += _when(_IOCTL[column], _never(1, _TERMINAL_INJECTION, errno.EPERM))
    of_a_process = [_argument(0), _Step(_JUMP_EQUAL, 0, 1), _fail(errno.EPERM)]
    steps += _when(_SETPRIORITY[column], [*of_a_process, *_only(1, (0,), errno.EPERM)])
    for numbers in _SELF_ONLY.values():
        steps += _when(numbers[column], _only(0, (0,), errno.EPERM))
    steps.append(_allow())
    return b"".join(struct.pack("HBBI", step.code, step.if_true, step.if_false, step.value) for step in steps)


def _when(number: int, body: list[_Step]) -> list[_Step]:
    """Run `body`, which must return, when the loaded call number is `number`."""
    return [_Step(_JUMP_EQUAL, number, 0, len(body)), *body]


def _only(argument: int, values: tuple[int, ...], code: int) -> list[_Step]:
    jumps = [_Step(_JUMP_EQUAL, value, len(values) - index) for index, value in enumerate(values)]
    return [_argument(argument), *jumps, _fail(code), _allow()]


def _never(argument: int, values: tuple[int, ...], code: int) -> list[_Step]:
    jumps = [_Step(_JUMP_EQUAL, value, len(values) - index) for index, value in enumerate(values)]
    return [_argument(argument), *jumps, _allow(), _fail(code)]


def _argument(index: int) -> _Step:
    return _Step(_LOAD, _FIRST_ARGUMENT + 8 * index)  # low half: both architectures are little endian


def _fail(code: int) -> _Step:
    return _Step(_RETURN, _ERRNO | code)


def _allow() -> _Step:
    return _Step(_RETURN, _ALLOW)
