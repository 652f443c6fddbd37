"""Starting, refusing to start, and dying: what the parent sees of an engine's process."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from palaestra.agents._engine import Sampling
from palaestra.agents.engines import EngineConfig, open_engine
from palaestra.errors import ConfigError, PolicyError, WorkerError
from tests.agents.engines.conftest import MAX_MODEL_LEN, TinyModel, require_library

CONFIG = EngineConfig(max_model_len=MAX_MODEL_LEN, max_num_seqs=4, kv_cache_mb=32, device="cpu")
ENGINES = ["transformers", "vllm"]


def children_of(session: int) -> list[str]:
    """Processes of the session that a worker leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_importing_the_engines_loads_neither_torch_nor_vllm_nor_transformers() -> None:
    code = (
        "import sys, palaestra.agents.engines, palaestra.agents.engines.vllm, palaestra.agents.engines.transformers\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_an_unknown_engine_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'vlm'; did you mean 'vllm'"):
        await open_engine("vlm", tmp_path, CONFIG, tmp_path / "log")


async def test_a_missing_library_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ENGINES else find(name))
    for name in ENGINES:
        with pytest.raises(ConfigError, match=r"is not installed; install palaestra\["):
            await open_engine(name, tmp_path, CONFIG, tmp_path / "log")


@pytest.mark.parametrize("name", ENGINES)
async def test_a_folder_without_a_model_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    require_library(name)
    for folder, reason in ((tmp_path, "no config.json"), (tmp_path / "nowhere", "no such model folder")):
        with pytest.raises(ConfigError, match=reason):
            await open_engine(name, folder, CONFIG, tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
async def test_a_model_without_weights_is_a_one_line_config_error(model_a: TinyModel, tmp_path: Path) -> None:
    shutil.copy(model_a.folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=f"transformers cannot load {tmp_path}") as caught:
        await open_engine("transformers", tmp_path, CONFIG, tmp_path / "log")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
async def test_a_damaged_file_of_weights_is_named(model_a: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(model_a.folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"cannot read weights {weights}: ") as caught:
        await open_engine("transformers", tmp_path / "model", CONFIG, tmp_path / "log")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
async def test_a_context_longer_than_the_model_is_cut_and_the_engine_says_so(
    name: str, model_a: TinyModel, tmp_path: Path
) -> None:
    require_library(name)
    config = CONFIG.model_copy(update={"max_model_len": MAX_MODEL_LEN + 1})
    engine = await open_engine(name, model_a.folder, config, tmp_path / "log")
    async with engine:
        assert engine.max_model_len == MAX_MODEL_LEN


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
async def test_a_killed_engine_fails_all_callers_at_once_and_leaves_nothing(
    name: str, model_a: TinyModel, tmp_path: Path
) -> None:
    require_library(name)
    engine = await open_engine(name, model_a.folder, CONFIG, tmp_path / "log", version=41)
    try:
        pid, before = engine.pid, (await engine.stats()).tokens
        with pytest.raises(PolicyError, match="version 41 is loaded"):
            await engine.load_weights(model_a.folder, 41)
        sampling = Sampling(max_tokens=MAX_MODEL_LEN)
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(_outcome(engine.generate([5, 6], sampling, stop_ids=[]))) for _ in range(12)]
            while (await engine.stats()).tokens == before:
                pass
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
        assert time.monotonic() - killed < 2
        for call in calls:
            assert isinstance(call.result(), WorkerError)
            assert f"{name} engine was killed by SIGKILL" in str(call.result())
        with pytest.raises(WorkerError, match="SIGKILL"):
            await engine.stats()
    finally:
        await engine.aclose()
        await engine.aclose()
    assert children_of(pid) == []


async def _outcome(call: Awaitable[object]) -> object:
    try:
        return await call
    except WorkerError as error:
        return error
