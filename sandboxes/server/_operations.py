"""What a client may ask of a box, by name: a frame in, a call of the `Sandbox` protocol, a frame out.

Invariant: nothing of a request is used before its type was checked; what does not fit is a `ValueError`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TypeVar

from palaestra.sandboxes._archives import pack_files
from palaestra.sandboxes._frames import Header, result_frame
from palaestra.sandboxes._protocol import OnOutput, Sandbox, Snapshot, Stream
from palaestra.sandboxes.server._answer import Emit

Operation = Callable[[Sandbox, Header, bytes, Emit], Awaitable[tuple[Header, bytes]]]
ValueT = TypeVar("ValueT")


async def _exec(box: Sandbox, request: Header, body: bytes, emit: Emit) -> tuple[Header, bytes]:
    argv, env = field(request, "argv", list), field(request, "env", dict)
    if not all(isinstance(text, str) for text in [*argv, *env.values()]):
        raise ValueError("argv and env must be texts")
    cwd, on_output = field(request, "cwd", str), _on_output(request, emit)
    result = await box.exec(argv, stdin=body, cwd=cwd, env=env, wall_s=_wall_s(request), on_output=on_output)
    return result_frame(result)


async def _python(box: Sandbox, request: Header, body: bytes, emit: Emit) -> tuple[Header, bytes]:
    split = field(request, "code_bytes", int)
    if not 0 <= split <= len(body):
        raise ValueError(f"code_bytes is {split} of {len(body)}")
    code, on_output = body[:split].decode("utf-8", errors="surrogatepass"), _on_output(request, emit)
    return result_frame(await box.run_python(code, stdin=body[split:], wall_s=_wall_s(request), on_output=on_output))


async def _read(box: Sandbox, request: Header, _: bytes, __: Emit) -> tuple[Header, bytes]:
    offset, max_bytes = field(request, "offset", int), field(request, "max_bytes", int)
    return {}, await box.read_file(field(request, "path", str), offset=offset, max_bytes=max_bytes)


async def _write(box: Sandbox, request: Header, body: bytes, _: Emit) -> tuple[Header, bytes]:
    await box.write_file(field(request, "path", str), body, mode=field(request, "mode", int))
    return {}, b""


async def _put(box: Sandbox, request: Header, body: bytes, _: Emit) -> tuple[Header, bytes]:
    await box.put_tree(body, field(request, "path", str))
    return {}, b""


async def _get(box: Sandbox, request: Header, _: bytes, __: Emit) -> tuple[Header, bytes]:
    max_bytes, max_files = field(request, "max_bytes", int), field(request, "max_files", int)
    files = await box.get_tree(field(request, "path", str), max_bytes=max_bytes, max_files=max_files)
    return {}, pack_files(files)


async def _snapshot(box: Sandbox, _: Header, __: bytes, ___: Emit) -> tuple[Header, bytes]:
    return {}, (await box.snapshot()).archive


async def _restore(box: Sandbox, _: Header, body: bytes, __: Emit) -> tuple[Header, bytes]:
    await box.restore(Snapshot(body))
    return {}, b""


async def _stats(box: Sandbox, _: Header, __: bytes, ___: Emit) -> tuple[Header, bytes]:
    return {"usage": dataclasses.asdict(await box.stats())}, b""


async def _renew(box: Sandbox, _: Header, __: bytes, ___: Emit) -> tuple[Header, bytes]:
    await box.renew()
    return {}, b""


BOX_OPERATIONS: dict[str, Operation] = {
    "exec": _exec,
    "get": _get,
    "put": _put,
    "python": _python,
    "read": _read,
    "renew": _renew,
    "restore": _restore,
    "snapshot": _snapshot,
    "stats": _stats,
    "write": _write,
}


def field(request: Header, name: str, kind: type[ValueT]) -> ValueT:
    """A value of a request; raises `ValueError` when it is missing or of another type."""
    value = request.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def _wall_s(request: Header) -> float | None:
    value = request.get("wall_s")
    return None if value is None else float(value if isinstance(value, int) else field(request, "wall_s", float))


def _on_output(request: Header, emit: Emit) -> OnOutput | None:
    if request.get("stream") is not True:
        return None

    def on_output(stream: Stream, piece: bytes) -> None:
        emit({"stream": int(stream == "stderr")}, piece)

    return on_output
