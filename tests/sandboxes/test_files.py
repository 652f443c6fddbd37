"""File transfer happens inside the box, on regular files only."""

from __future__ import annotations

import errno

import pytest

from palaestra.sandboxes import Limits, Sandbox, SandboxBackend, SandboxSpec


async def test_written_bytes_are_read_back_and_parents_made(box: Sandbox) -> None:
    blob = bytes(range(256)) * 5000
    await box.write_file("/workspace/a/b/c.bin", blob)
    assert await box.read_file("/workspace/a/b/c.bin", max_bytes=2 << 20) == blob


async def test_write_replaces_and_relative_paths_are_in_the_workspace(box: Sandbox) -> None:
    await box.write_file("x.txt", b"a long first version")
    await box.write_file("x.txt", b"short")
    assert await box.read_file("/workspace/x.txt") == b"short"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        ("mkfifo it", errno.EACCES),
        ("mkdir it", errno.EISDIR),
        ("ln -s /etc/passwd it", errno.ELOOP),
        ("true", errno.ENOENT),
        ("touch it; chmod 000 it", errno.EACCES),
    ],
)
async def test_read_refuses_what_is_not_a_readable_regular_file(box: Sandbox, make: str, code: int) -> None:
    await box.exec(["sh", "-c", make])
    with pytest.raises(OSError, match=r"\w") as refused:
        await box.read_file("/workspace/it")
    assert refused.value.errno == code
    assert refused.value.filename == "/workspace/it"


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "/proc/1/environ", "/dev/null"])
async def test_devices_and_kernel_files_are_refused(box: Sandbox, path: str) -> None:
    with pytest.raises(OSError, match=r"not a regular file|denied"):
        await box.read_file(path)
    with pytest.raises(OSError, match=r"not a regular file|denied"):
        await box.write_file(path, b"x")


async def test_write_does_not_hang_on_a_fifo_or_follow_a_link(box: Sandbox) -> None:
    await box.exec(["sh", "-c", "mkfifo pipe; ln -s /tmp/target link"])
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=r"\w"):
            await box.write_file(f"/workspace/{name}", b"x")
    assert (await box.exec(["ls", "/tmp"])).stdout == b""


async def test_too_large_a_file_is_refused_by_size(box: Sandbox) -> None:
    await box.exec(["truncate", "-s", "2000", "it"])
    with pytest.raises(OSError, match="2000 bytes"):
        await box.read_file("it", max_bytes=1999)


async def test_write_to_a_full_disk_or_read_only_place_raises(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(workspace_mb=1)))
    with pytest.raises(OSError, match=r"\w") as full:
        await box.write_file("/workspace/big", bytes(2 << 20))
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"\w") as fixed:
        await box.write_file("/usr/bin/new", b"")
    assert fixed.value.errno in (errno.EROFS, errno.EACCES)


@pytest.mark.parametrize("path", ["", "a\0b"])
async def test_paths_that_are_no_paths_are_bad_arguments(box: Sandbox, path: str) -> None:
    with pytest.raises(ValueError, match="not a file path"):
        await box.read_file(path)


async def test_long_and_odd_names_are_plain_os_errors_or_work(box: Sandbox) -> None:
    with pytest.raises(OSError, match=r"\w") as long:
        await box.write_file("/workspace/" + "n" * 5000, b"")
    assert long.value.errno == errno.ENAMETOOLONG
    await box.write_file("/workspace/new\nline \udcff", b"odd")
    assert await box.read_file("/workspace/new\nline \udcff") == b"odd"


async def test_a_name_that_is_no_text_is_an_os_error_and_the_box_lives(box: Sandbox) -> None:
    with pytest.raises(OSError, match="no text"):
        await box.read_file("/workspace/\ud800")
    assert (await box.exec(["true"])).is_ok


async def test_what_the_kernel_makes_up_is_read_as_it_is_or_refused(box: Sandbox) -> None:
    listing = await box.exec(
        ["sh", "-c", "cat /sys/class/net/lo/mtu; cat /sys/class/net/lo/speed >/dev/null 2>&1; echo $?"]
    )
    if listing.stdout.endswith(b"\n1\n"):  # there is a /sys, and a file in it that cannot be read
        assert await box.read_file("/sys/class/net/lo/mtu") == listing.stdout.partition(b"\n")[0] + b"\n"
        with pytest.raises(OSError, match=r"\w"):
            await box.read_file("/sys/class/net/lo/speed")
    else:
        with pytest.raises(FileNotFoundError):
            await box.read_file("/sys/class/net/lo/mtu")
    assert (await box.exec(["true"])).is_ok


async def test_a_file_is_read_whole_whatever_its_size(box: Sandbox) -> None:
    for size in ((1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20):
        data = bytes(range(251)) * (size // 251 + 1)
        await box.write_file("/workspace/f", data[:size])
        assert await box.read_file("/workspace/f", max_bytes=size) == data[:size]
        assert await box.read_file("/workspace/f", offset=7, max_bytes=size) == data[7:size]
