"""What an execution does and how its end is told apart."""

from __future__ import annotations

import asyncio

import pytest

from palaestra.errors import SandboxError
from palaestra.sandboxes import Ended, Limits, Sandbox, SandboxBackend, SandboxSpec
from tests.sandboxes.hostview import eventually, marker, processes_with


async def test_exec_returns_streams_and_code_zero(box: Sandbox) -> None:
    result = await box.exec(["sh", "-c", "echo out; echo err >&2"])
    assert (result.ended, result.exit_code, result.signal) == (Ended.EXIT, 0, None)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.is_ok


@pytest.mark.parametrize("code", [1, 3, 124, 137, 143])
async def test_exit_codes_are_never_mistaken_for_limits(box: Sandbox, code: int) -> None:
    result = await box.exec(["sh", "-c", f"exit {code}"])
    assert (result.ended, result.exit_code) == (Ended.EXIT, code)
    assert not result.is_ok


async def test_death_by_signal_is_told(box: Sandbox) -> None:
    result = await box.exec(["sh", "-c", "kill -9 $$"])
    assert (result.ended, result.exit_code, result.signal) == (Ended.SIGNAL, None, 9)


async def test_missing_program_is_an_observation(box: Sandbox) -> None:
    result = await box.exec(["no-such-program"])
    assert (result.ended, result.exit_code) == (Ended.EXIT, 127)
    assert b"no-such-program" in result.stderr


async def test_stdin_env_and_cwd_reach_the_program(box: Sandbox) -> None:
    result = await box.exec(["sh", "-c", "cat; echo $COLOUR; pwd"], stdin=b"in\n", env={"COLOUR": "red"}, cwd="/tmp")
    assert result.stdout == b"in\nred\n/tmp\n"


async def test_large_stdin_arrives_whole(box: Sandbox) -> None:
    result = await box.exec(["wc", "-c"], stdin=b"x" * 3_000_000)
    assert result.stdout == b"3000000\n"


async def test_no_host_variable_is_visible(box: Sandbox) -> None:
    result = await box.exec(["env"])
    names = {line.split(b"=")[0] for line in result.stdout.splitlines()}
    assert names == {b"PATH", b"HOME", b"LANG", b"TMPDIR", b"USER", b"PYTHONHASHSEED", b"PYTHONDONTWRITEBYTECODE"}


async def test_bytes_survive_intact(box: Sandbox) -> None:
    blob = bytes(range(256)) * 4
    assert (await box.exec(["cat"], stdin=blob)).stdout == blob


async def test_run_python_is_a_fresh_main_each_time(box: Sandbox) -> None:
    await box.run_python("leak = 1")
    result = await box.run_python("print(__name__, 'leak' in globals()); raise SystemExit(4)")
    assert (result.stdout, result.exit_code) == (b"__main__ False\n", 4)


async def test_run_python_reads_stdin_and_shows_the_failing_line(box: Sandbox) -> None:
    result = await box.run_python("value = input()\nint(value)", stdin=b"abc\n")
    assert result.exit_code == 1
    assert b"    int(value)" in result.stderr
    assert b"ValueError" in result.stderr
    assert b"palaestra" not in result.stderr


async def test_run_python_prints_the_same_bytes_in_every_box(backend: SandboxBackend) -> None:
    code = "import random; print(random.random(), hash('a'), {'x', 'y', 'z'})"
    outputs = []
    for _ in range(2):
        box = await backend.create(SandboxSpec())
        outputs.append((await box.run_python(code)).stdout)
        await box.aclose()
    assert outputs[0] == outputs[1]


async def test_workspace_modules_import_but_never_shadow_the_standard_library(box: Sandbox) -> None:
    await box.write_file("/workspace/json.py", b"raise SystemExit('shadowed')")
    await box.write_file("/workspace/solution.py", b"answer = 42")
    result = await box.run_python("import json, solution; print(json.dumps(solution.answer))")
    assert result.stdout == b"42\n"


async def test_standard_library_is_complete(box: Sandbox) -> None:
    names = "json, unittest, sqlite3, ssl, hashlib, ctypes, asyncio, bz2, lzma, zlib, decimal, multiprocessing"
    result = await box.exec(["python3", "-c", f"import {names}; print('ok')"])
    assert result.stdout == b"ok\n", result.stderr


async def test_wall_timeout_kills_the_process_tree(box: Sandbox) -> None:
    name = marker()
    command = f"trap '' TERM; echo before; setsid sleep {name} & sleep {name}"
    running = asyncio.ensure_future(box.exec(["bash", "-c", command], wall_s=1.0))
    assert await eventually(lambda: len(processes_with(name)) >= 2)  # the payload really ran
    result = await running
    assert result.ended is Ended.WALL_TIMEOUT
    assert result.stdout == b"before\n"
    assert 1.0 <= result.wall_s < 20.0  # the machine may be busy; the sleepers would take much longer
    assert processes_with(name) == []


async def test_daemons_end_with_their_execution(box: Sandbox) -> None:
    name = marker()
    result = await box.exec(["bash", "-c", f"setsid sleep {name} & echo started"])
    assert result.stdout == b"started\n"
    assert result.ended is Ended.EXIT  # the daemon holds stdout open, the answer does not wait for it
    assert processes_with(name) == []


async def test_cpu_timeout_is_told_from_a_signal(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(cpu_s=1.0, wall_s=100.0)))
    result = await box.run_python("while True: pass")
    assert result.ended is Ended.CPU_TIMEOUT


async def test_output_at_the_limit_is_whole_and_beyond_it_keeps_head_and_tail(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(output_kb=4)))
    exact = await box.run_python("print('a' * 4095)")
    assert (len(exact.stdout), exact.stdout_total) == (4096, 4096)
    longer = await box.run_python("print('H' * 2048 + 'M' * 100 + 'T' * 2048, end='')")
    assert longer.stdout == b"H" * 2048 + b"T" * 2048
    assert (longer.stdout_total, longer.ended) == (4196, Ended.EXIT)


async def test_flood_is_stopped(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(output_kb=4)))
    for stream in ("", " >&2"):
        result = await box.exec(["sh", "-c", f"yes{stream}"])
        assert result.ended is Ended.OUTPUT_LIMIT
        assert len(result.stdout) + len(result.stderr) == 4096


async def test_wall_argument_only_tightens(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(wall_s=0.3)))
    result = await box.exec(["sleep", "20"], wall_s=20.0)
    assert result.ended is Ended.WALL_TIMEOUT


async def test_cancelled_execution_ends_the_box(box: Sandbox) -> None:
    name = marker()
    running = asyncio.ensure_future(box.exec(["sleep", name]))
    assert await eventually(lambda: bool(processes_with(name)))
    running.cancel()
    await asyncio.wait([running])
    assert await eventually(lambda: not processes_with(name))
    with pytest.raises(SandboxError, match="unusable"):
        await box.exec(["true"])


async def test_text_that_cannot_be_encoded_is_an_observation(box: Sandbox) -> None:
    results = [
        await box.run_python("print('\ud800')"),
        await box.exec(["echo", "\ud800"]),
        await box.exec(["true"], cwd="/\ud800"),
        await box.exec(["echo", "a\0b"]),
        await box.exec(["true"], cwd="/missing"),
    ]
    assert all(result.ended is Ended.EXIT and result.exit_code for result in results), results
    assert (await box.exec(["true"])).is_ok
