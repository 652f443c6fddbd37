"""Who is dead: a process that ended, never one that merely cannot be seen from here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palaestra.sandboxes._owner import is_dead, is_of_another_boot, owner_of, this_owner
from palaestra.sandboxes._records import Lease

_ASK = "import sys; from palaestra.sandboxes._owner import is_dead; print(is_dead(sys.argv[1]))"
_TELL = "from palaestra.sandboxes._owner import this_owner; print(this_owner())"

_ASK_HIDDEN = """
import os, subprocess, sys
from palaestra.sandboxes._owner import is_dead
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(os.path.exists(f"/proc/{sys.argv[2]}"), is_dead(sys.argv[1]))
"""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"this machine gives no namespaces: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_that_ended_is_dead_and_this_one_is_not() -> None:
    ended = _run(sys.executable, "-c", _TELL)
    assert is_dead(ended)
    assert not is_dead(this_owner())


def test_a_process_that_nobody_waited_for_is_dead() -> None:
    command = [sys.executable, "-c", f"{_TELL}; import sys; sys.stdout.flush(); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().decode().strip()
        assert not is_dead(owner)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie
        assert is_dead(owner)


def test_a_process_whose_first_thread_alone_has_ended_is_alive() -> None:
    code = """
import ctypes, threading, time
from palaestra.sandboxes._owner import this_owner
print(this_owner(), flush=True)
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().decode().strip()
        stat = Path(f"/proc/{process.pid}/stat")
        try:
            deadline = time.monotonic() + 10
            while stat.read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline
            assert not is_dead(owner)
        finally:
            process.kill()


def test_a_living_owner_is_not_dead_to_one_who_has_no_descriptor_left() -> None:
    code = """
import os, resource, sys
from palaestra.sandboxes._owner import is_dead, this_owner
known = sys.argv[1] == "warm" and this_owner()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    this_owner()
    told = "told"
except OSError:
    told = "untold"
dead = is_dead(sys.argv[2])
for fd in held:
    os.close(fd)
print(told, dead)
"""
    for state in ("warm", "cold"):
        assert _run(sys.executable, "-c", code, state, this_owner()) == "untold False"


def test_another_process_with_the_same_number_is_another_owner() -> None:
    boot, pid, start, namespace = this_owner().split(":")
    assert is_dead(f"{boot}:{pid}:{int(start) - 1}:{namespace}")


def test_an_owner_of_another_pid_namespace_is_never_taken_for_dead() -> None:
    apart = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    assert not is_dead(_run(*apart, sys.executable, "-c", _TELL)), "it ended, but only its own namespace can know"
    assert _run(*apart, sys.executable, "-c", _ASK, this_owner()) == "False"


@pytest.mark.skipif(os.geteuid() != 0, reason="hiding another user's processes needs root")
def test_an_owner_that_proc_hides_is_not_dead() -> None:
    hidden = _run("unshare", "--mount", sys.executable, "-c", _ASK_HIDDEN, this_owner(), str(os.getpid()))
    assert hidden.split() == ["False", "False"]


@pytest.mark.parametrize("text", ["", "somebody", "a:b:c:d", "without namespace"])
def test_what_is_no_owner_is_left_alone(text: str) -> None:
    assert not is_dead(this_owner().rpartition(":")[0] if text == "without namespace" else text)


def test_a_lease_of_another_boot_is_an_orphan_and_a_box_of_another_boot_is_not() -> None:
    owner = "another-boot:" + this_owner().partition(":")[2]
    assert is_of_another_boot(owner)
    assert not is_dead(owner), "the daemon may be another machine's"
    lease = Lease(id="x", backend="jail", owner=owner, label="", handle="", lifetime_s=1.0, began_s=0.0)
    assert lease.is_orphan


def test_a_process_that_is_gone_has_an_owner_text_of_its_own() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        assert "dead" in owner_of(process.pid)
