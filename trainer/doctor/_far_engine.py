"""An engine that another process of ours holds: each request is a connection to that process's socket.

Invariants: a request that is left is cancelled at the engine; nothing is answered after `served` ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palaestra.agents import Completion, Engine, EngineStats, Sampling
from palaestra.errors import PalaestraError

_NAME = "engine.sock"
_LENGTH = struct.Struct("!Q")


class FarEngine:
    """The `Engine` of whoever serves it at `path`, who also closes it."""

    def __init__(self, path: Path, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self._path = path

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        """Sample one completion."""
        completion: Completion = await self._ask("generate", prompt, sampling, stop_ids=stop_ids, seed=seed)
        return completion

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probability of every token but the first."""
        scores: list[NDArray[np.float32]] = await self._ask("score", sequences)
        return scores

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        """Replace the weights."""
        await self._ask("load_weights", folder, version, checksum)

    async def stats(self) -> EngineStats:
        """Running totals."""
        stats: EngineStats = await self._ask("stats")
        return stats

    async def aclose(self) -> None:
        """Nothing to close: no connection outlives its request."""

    async def _ask(self, method: str, *args: object, **options: object) -> Any:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            _write(writer, (method, args, options))
            answer = await _read(reader)
        finally:
            writer.close()
        if isinstance(answer, PalaestraError):
            raise answer
        return answer


@asynccontextmanager
async def served(engine: Engine, folder: Path) -> AsyncIterator[Path]:
    """Inside, a child of ours has the engine too, at the socket that this gives; it lies in `folder`."""
    async with asyncio.TaskGroup() as tasks, _short(folder) as short:
        running: set[asyncio.Task[None]] = set()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            running.add(task := tasks.create_task(_answer(engine, reader, writer)))
            task.add_done_callback(running.discard)

        server = await asyncio.start_unix_server(take, short / _NAME)
        try:
            yield short / _NAME
        finally:
            server.close()
            for task in running:
                task.cancel()


@asynccontextmanager
async def _short(folder: Path) -> AsyncIterator[Path]:
    """The same folder by a short name: the path of a socket may have 107 bytes, TMPDIR more."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


async def _answer(engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request, unless whoever asked leaves before."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
        method, args, options = await _read(reader)
        asked = asyncio.ensure_future(getattr(engine, method)(*args, **options))
        left = asyncio.ensure_future(reader.read())
        try:
            await asyncio.wait((asked, left), return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                error = asked.exception()
                if error is not None and not isinstance(error, PalaestraError):
                    raise error
                _write(writer, error if error is not None else asked.result())
                await writer.drain()
        finally:
            asked.cancel()
            left.cancel()
            await asyncio.wait((asked, left))


def _write(writer: asyncio.StreamWriter, value: object) -> None:
    body = pickle.dumps(value, protocol=5)
    writer.write(_LENGTH.pack(len(body)) + body)


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))
