"""The memory plan: sizes from headers alone, sums by hand, and a plan that cannot fit fails."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.errors import ConfigError
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor import Verdict
from palaestra.trainer.doctor import _machine as machine
from palaestra.trainer.doctor._memory_plan import judge_memory, plan
from palaestra.trainer.doctor._model_size import ModelSize, read_size
from tests.trainer.doctor_jobs import CPU, GPU

SIZE = ModelSize(
    num_parameters=1 << 20, num_layers=2, hidden_size=64, ffn_size=128, num_kv_heads=2, head_dim=32, vocab_size=1000
)
BILLIONS = replace(SIZE, num_parameters=4_000_000_000)


def write_model(folder: Path, shapes: dict[str, list[int]], **config: object) -> Path:
    """A configuration and a header of weights, without the weights."""
    folder.mkdir(exist_ok=True)
    layout = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps({**layout, **config}))
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def test_size_comes_from_the_headers(tmp_path: Path) -> None:
    shapes = {"embed.weight": [100, 64], "norm.weight": [64], "lm_head.weight": [100, 64]}
    size = read_size(str(write_model(tmp_path, shapes)))
    assert size.num_parameters == 100 * 64 + 64 + 100 * 64
    assert (size.head_dim, size.num_kv_heads, size.ffn_size) == (16, 4, 256)
    tied = read_size(str(write_model(tmp_path, shapes, tie_word_embeddings=True, num_key_value_heads=2)))
    assert tied.num_parameters == 100 * 64 + 64
    assert tied.num_kv_heads == 2


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_damaged_model_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = write_model(tmp_path, {"embed.weight": [2, 2]})
    (folder / damage).write_bytes(b"\xff" * 16)
    with pytest.raises(ConfigError, match="cannot read the size of"):
        read_size(str(folder))


def needs(config: GRPOConfig, size: ModelSize = SIZE, *, on_gpu: bool = False) -> dict[str, tuple[int, bool]]:
    parts = plan(size, config, GPU if on_gpu else CPU, 100)
    return {need.what: (need.mb, need.is_gpu) for need in parts}


def test_learner_takes_sixteen_bytes_a_parameter_and_a_copy_for_several_updates() -> None:
    one = needs(GRPOConfig())
    assert one["learner's weights, gradients and moments"] == (16, False)
    assert one["published weights"] == (8, False)
    assert one["environments"] == (100, False)
    several = needs(GRPOConfig.parse({"learner": {"num_minibatches": 2}}))
    assert several["learner's weights, gradients and moments"] == (28, False)


def test_micro_batch_grows_with_tokens_and_vocabulary() -> None:
    config = {"learner": {"max_micro_batch_tokens": 1024}, "engine_config": {"max_model_len": 512}}
    small = needs(GRPOConfig.parse(config))["micro-batch"][0]
    by_hand = 1024 * 4 * (2 * (8 * 64 + 3 * 128 + 2 * 2 * 32) + 3 * 1000)
    assert small == -(-by_hand >> 20)


def test_engine_cache_by_engine_and_device() -> None:
    cpu = needs(GRPOConfig.parse({"engine_config": {"kv_cache_mb": 300}}))
    assert cpu["attention cache"] == (300, False)
    assert cpu["engine's weights"] == (4, False)
    gpu = needs(GRPOConfig.parse({"engine_config": {"gpu_memory_utilization": 0.25}}), on_gpu=True)
    assert gpu["engine (its share of the GPU)"] == (20_000, True)
    assert gpu["micro-batch"][1]
    transformers = {"engine": "transformers", "engine_config": {"max_model_len": 1024, "max_num_seqs": 8}}
    rows = needs(GRPOConfig.parse(transformers))
    assert rows["attention cache"] == (2 * 2 * 2 * 32 * 4 * 8 * 1024 >> 20, False)


def test_what_cannot_fit_fails_and_what_is_tight_warns() -> None:
    small = plan(SIZE, GRPOConfig(), CPU, 100)
    assert judge_memory(small, CPU).verdict is Verdict.OK
    finding = judge_memory(plan(BILLIONS, GRPOConfig(), CPU, 100), CPU)
    assert finding.verdict is Verdict.FAILURE
    assert "does not fit" in finding.detail
    total = sum(need.mb for need in small)
    assert judge_memory(small, replace(CPU, free_mb=total + 10)).verdict is Verdict.WARNING
    assert judge_memory(small, replace(CPU, free_mb=total - 10)).verdict is Verdict.FAILURE


def test_the_gpu_is_a_place_of_its_own() -> None:
    config = GRPOConfig.parse({"engine_config": {"gpu_memory_utilization": 0.9}})
    finding = judge_memory(plan(BILLIONS, config, GPU, 100), GPU)
    assert finding.verdict is Verdict.FAILURE
    assert "GPU: about" in finding.detail


def test_machine_tells_its_memory_and_the_first_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "2.13.0")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '70000, 81559'\necho '1, 2'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.look_at_machine()
    assert (found.gpu_free_mb, found.gpu_total_mb) == (70_000, 81_559)
    assert found.free_mb > 0
    assert found.uses_gpu("auto")
    assert not found.uses_gpu("cpu")
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert not machine.look_at_machine().uses_gpu("auto")


def test_torch_without_cuda_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "2.13.0+cpu")
    assert machine.look_at_machine().gpu_total_mb == 0
