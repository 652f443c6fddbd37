"""Folders into and out of boxes, snapshots, forks and what a box says that it uses."""

from __future__ import annotations

import errno

import pytest

from palaestra.sandboxes import Limits, Sandbox, SandboxBackend, SandboxSpec, fork

_FILES = {"a.txt": b"a", "deep/er/b.bin": bytes(range(256)), "empty": b"", "odd \u00e9\nname": b"x"}


async def test_a_tree_is_put_and_got_back(box: Sandbox) -> None:
    await box.put_tree(_FILES)
    assert await box.get_tree() == _FILES
    await box.put_tree({"a.txt": b"newer"}, "deep")
    assert await box.get_tree("/workspace/deep") == {"er/b.bin": bytes(range(256)), "a.txt": b"newer"}


async def test_a_large_tree_fits_a_box_that_has_room_for_it(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(memory_mb=160, workspace_mb=48)))
    files = {f"{number}.bin": bytes([number]) * (4 << 20) for number in range(10)}
    await box.put_tree(files)
    assert await box.get_tree() == files


async def test_links_and_special_files_are_left_out_and_hard_links_are_files(box: Sandbox) -> None:
    await box.exec(["sh", "-c", "echo x > real; ln real twin; ln -s real link; ln -s /etc etc; mkfifo pipe; mkdir d"])
    assert await box.get_tree() == {"real": b"x\n", "twin": b"x\n"}


async def test_more_than_was_asked_for_is_refused(box: Sandbox) -> None:
    await box.exec(["sh", "-c", "head -c 3000000 /dev/zero > big; for n in 1 2 3; do echo > $n; done"])
    with pytest.raises(OSError, match="more than 1000000") as large:
        await box.get_tree(max_bytes=1_000_000)
    assert large.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="more than 3 files"):
        await box.get_tree(max_files=3)
    await box.exec(["sh", "-c", "truncate -s 1T sparse || truncate -s 60M sparse"])
    with pytest.raises(OSError, match="more than"):
        await box.get_tree(max_bytes=1 << 20)
    with pytest.raises(ValueError, match="at most"):
        await box.get_tree(max_bytes=1 << 40)
    assert (await box.exec(["true"])).is_ok


async def test_a_tree_that_does_not_fit_or_is_not_there_is_an_os_error(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(workspace_mb=1)))
    with pytest.raises(OSError, match=r"\w") as full:
        await box.put_tree({"big": bytes(2 << 20)})
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"\w") as missing:
        await box.get_tree("/workspace/missing")
    assert missing.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="not a tar archive"):
        await box.put_tree(b"no archive at all" * 100)
    assert (await box.exec(["true"])).is_ok


async def test_a_snapshot_keeps_every_file_and_restores_all_of_it(box: Sandbox) -> None:
    make = "echo one > a; chmod 640 a; ln -s a l; ln a h; mkdir -p d/e; echo x > d/e/f; chmod 500 d; echo t > /tmp/t"
    assert (await box.exec(["sh", "-c", make + "; touch -d @1000000000 a; echo s > /dev/shm/s"])).is_ok
    look = "find /workspace /tmp /dev/shm -printf '%p %y %m %s %l %n\\n' | sort; stat -c %Y a; cat a d/e/f /tmp/t"
    before = (await box.exec(["sh", "-c", look])).stdout
    assert before.count(b"\n") >= 15
    snapshot = await box.snapshot()
    spoil = "chmod 700 d; rm -rf * /tmp/t; mkdir a; echo new > /tmp/new; mkdir locked; touch locked/x; chmod 000 locked"
    assert (await box.exec(["sh", "-c", spoil])).is_ok
    assert (await box.exec(["sh", "-c", look])).stdout != before
    await box.restore(snapshot)
    assert (await box.exec(["sh", "-c", look])).stdout == before


async def test_a_fork_goes_its_own_way(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec())
    await box.put_tree(_FILES)
    twin = await fork(backend, box, SandboxSpec())
    await twin.write_file("a.txt", b"changed")
    assert await box.get_tree() == _FILES
    assert await twin.get_tree() == {**_FILES, "a.txt": b"changed"}


async def test_a_snapshot_that_does_not_fit_is_an_os_error(backend: SandboxBackend) -> None:
    large = await backend.create(SandboxSpec())
    await large.write_file("big", bytes(3 << 20))
    snapshot = await large.snapshot()
    small = await backend.create(SandboxSpec(limits=Limits(workspace_mb=1)))
    with pytest.raises(OSError, match=r"\w") as full:
        await small.restore(snapshot)
    assert full.value.errno == errno.ENOSPC


async def test_files_are_read_from_an_offset_and_written_with_a_mode(box: Sandbox) -> None:
    await box.write_file("run.sh", b"#!/bin/sh\necho ran\n", mode=0o755)
    assert (await box.exec(["./run.sh"])).stdout == b"ran\n"
    assert await box.read_file("run.sh", offset=10, max_bytes=9) == b"echo ran\n"
    assert await box.read_file("run.sh", offset=1000) == b""
    with pytest.raises(OSError, match="9 bytes are there, more than 8"):
        await box.read_file("run.sh", offset=10, max_bytes=8)
    with pytest.raises(ValueError, match="negative"):
        await box.read_file("run.sh", offset=-1)
    await box.write_file("setuid", b"", mode=0o6755)
    assert (await box.exec(["stat", "-c", "%a", "setuid"])).stdout == b"755\n"


async def test_stats_tell_what_was_used(box: Sandbox) -> None:
    before = await box.stats()
    result = await box.run_python(
        "open('x', 'wb').write(bytes(3 << 20)); data = bytearray(40 << 20)\nsum(range(10**6))"
    )
    after = await box.stats()
    assert after.num_execs == before.num_execs + 1
    assert after.cpu_s - before.cpu_s == pytest.approx(result.cpu_s)
    assert result.cpu_s > 0
    assert after.workspace_bytes - before.workspace_bytes >= 3 << 20
    assert after.num_files == before.num_files + 1
    assert after.memory_peak_bytes is None or after.memory_peak_bytes >= 43 << 20
    assert after.age_s > before.age_s


async def test_a_lifetime_begins_anew_when_it_is_renewed(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(lifetime_s=60.0)))
    await box.exec(["sleep", "0.3"])
    assert (await box.stats()).lifetime_left_s < 59.8
    await box.renew()
    assert (await box.stats()).lifetime_left_s > 59.8
