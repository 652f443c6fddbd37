"""Attempts 36 to 39: floods, boundaries, bytes that are no text, and what was said before the end."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import pytest

from palaestra.sandboxes import Cut, Ended, Sandbox
from tests.conformance.abuse.scene import (
    Scene,
    attempt,
    bytes_to_disk,
    cpu_seconds,
    peak_memory,
    raises_os_error,
    reset_peak_memory,
)
from tests.sandboxes.engines import containers, inspect

_MB = 1 << 20
_FLOODS = {
    "lines": "while True: os.write(1, b'a line\\n' * 8000)",
    "errors": "while True: os.write(2, b'a line\\n' * 8000)",
    "no line": "while True: os.write(1, bytes(1 << 16))",
    "both, by many": "os.fork(); os.fork()\nwhile True: os.write(1, b'x' * 4096); os.write(2, b'y' * 4096)",
}


async def _floods(scene: Scene) -> None:
    for code in _FLOODS.values():
        command = [sys.executable, "-c", f"import os\n{code}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            assert len(process.stdout.read(16 * _MB)) == 16 * _MB
            process.stdout.close()  # which ends all of them
            process.kill()


@attempt(36, "flood-of-output", control=_floods)
async def _(scene: Scene) -> bool:
    watched = {scene.holder_pid, os.getpid()}  # a server, and the client that its answers come to
    written = {pid: bytes_to_disk(pid) for pid in watched}
    for code in _FLOODS.values():
        before = {pid: (reset_peak_memory(pid), cpu_seconds(pid)) for pid in watched}
        result = await scene.run(code)
        for pid, (memory, cpu_s) in before.items():
            assert peak_memory(pid) - memory < 16 * _MB
            assert cpu_seconds(pid) - cpu_s < 0.2
        assert result.ended is Ended.OUTPUT_LIMIT
        assert max(len(result.stdout), len(result.stderr)) == 1 << 16
        assert result.stdout_total + result.stderr_total > 1 << 19
    # neither do we keep it, nor an engine: its log is where such a flood would fill the disk
    assert all(bytes_to_disk(pid) - before < _MB for pid, before in written.items())
    ours = [one for one in containers(owned=True) if one.owner_pid == scene.holder_pid]
    assert bool(ours) == (scene.backend.name in ("docker", "podman"))
    for known in map(inspect, ours):
        assert known["HostConfig"]["LogConfig"]["Type"] == "none"
        assert not known.get("LogPath")
    return (await scene.box.exec(["true"])).is_ok


_NUMBERS = b"".join(b"%09d\n" % number for number in range(2000))


async def _a_full_buffer_does_not_tell(scene: Scene) -> None:
    """Whoever reads just as much as it keeps cannot say whether there was more."""
    kept = []
    for size in (10 << 10, (10 << 10) + 1):
        with subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            kept.append(process.stdout.read(10 << 10))
    assert kept[0] == kept[1]


@attempt(37, "output-at-the-limit", control=_a_full_buffer_does_not_tell)
async def _(scene: Scene) -> bool:
    kept = 10 << 10
    box = await scene.make(output_kb=10)
    for size, cut in (
        (kept - 1, None),
        (kept, None),
        (kept + 1, Cut(kept // 2, 1)),
        (15_000, Cut(kept // 2, 15_000 - kept)),
    ):
        data = _NUMBERS[:size]
        for stream in ("stdout", "stderr"):
            result = await box.run_python(f"import sys; sys.{stream}.buffer.write(sys.stdin.buffer.read())", stdin=data)
            got, total = getattr(result, stream), getattr(result, f"{stream}_total")
            whole = data if cut is None else data[: cut.at] + data[cut.at + cut.num_bytes :]
            assert (result.ended, total) == (Ended.EXIT, size)
            assert (got, result.cut(stream)) == (whole, cut)
    return True


_ODD = bytes(range(256)) + b"\0\0\xff\xfe\xc0\x80\xed\xa0\x80\x1b[2J\x1b]0;title\x07\x9b31m\r\r\n" * 50


async def _echoes(box: Sandbox, data: bytes) -> bool:
    result = await box.exec(["sh", "-c", "tee /dev/stderr"], stdin=data)
    return (result.stdout, result.stderr, result.is_ok) == (data, data, True)


async def _text_is_not_bytes(scene: Scene) -> None:
    """Read as text, these bytes are an error, or become others."""
    (scene.folder / "odd").write_bytes(_ODD)
    with pytest.raises(UnicodeDecodeError):
        subprocess.run(["cat", scene.folder / "odd"], capture_output=True, text=True, encoding="utf-8", check=True)
    read = subprocess.run(
        ["cat", scene.folder / "odd"], capture_output=True, encoding="utf-8", errors="replace", check=True
    )
    assert read.stdout.encode() != _ODD


@attempt(38, "bytes-that-are-no-text", control=_text_is_not_bytes)
async def _(scene: Scene) -> bool:
    assert await _echoes(scene.box, _ODD)
    code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    result = await scene.box.run_python(code, stdin=_ODD)
    assert result.stdout == _ODD
    assert "\\xff" in result.text("stdout")
    await scene.box.write_file("/workspace/odd", _ODD)
    assert await scene.box.read_file("/workspace/odd") == _ODD
    await _million_lines(scene)
    await _two_gigabytes(scene)
    return True


async def _million_lines(scene: Scene) -> None:
    code = "import sys; sys.stdout.write(''.join(f'line {n}\\n' for n in range(1_000_000)))"
    short = await scene.box.run_python(code)
    assert short.ended is Ended.OUTPUT_LIMIT
    assert short.stdout.startswith(b"line 0\nline 1\n")
    box = await scene.make(output_kb=16 << 10)
    whole = await box.run_python(code)
    assert (whole.ended, whole.cut("stdout"), whole.stdout.count(b"\n")) == (Ended.EXIT, None, 1_000_000)
    expected = "".join(f"line {n}\n" for n in range(1_000_000)).encode()
    assert hashlib.sha256(whole.stdout).digest() == hashlib.sha256(expected).digest()


async def _two_gigabytes(scene: Scene) -> None:
    size = 2 << 30
    box = await scene.make(memory_mb=2200, workspace_mb=2100, file_mb=2100)
    assert (await box.exec(["sh", "-c", f"truncate -s {size - 4} large && printf tail >> large"])).is_ok
    with pytest.raises(OSError, match=str(size)):
        await box.read_file("/workspace/large")
    assert await box.read_file("/workspace/large", offset=size - 4) == b"tail"
    assert await raises_os_error(box.get_tree(), 30.0)
    with pytest.raises(ValueError, match="bytes are more"):
        await box.write_file("/workspace/too-large", bytes((64 << 20) + 1))


_TALKS = "import os, time\nos.write(1, b'out\\n')\nos.write(2, b'err\\n')\ntime.sleep(60)"


async def _talks_before_it_sleeps(scene: Scene) -> None:
    with subprocess.Popen([sys.executable, "-c", _TALKS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 99) == b"out\n"
        assert process.poll() is None
        process.kill()


@attempt(39, "output-before-a-time-out", control=_talks_before_it_sleeps)
async def _(scene: Scene) -> bool:
    began_s = time.monotonic()
    result = await scene.box.run_python(_TALKS, wall_s=0.5)
    took_s = time.monotonic() - began_s - result.queue_s
    assert result.ended is Ended.WALL_TIMEOUT
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    return 0.5 <= took_s < 2.5
