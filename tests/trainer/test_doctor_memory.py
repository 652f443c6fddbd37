"""The memory plan: sizes from headers alone, sums by hand, and a plan that cannot fit fails."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palaestra.errors import ConfigError
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor import Verdict
from palaestra.trainer.doctor import _machine as machine
from palaestra.trainer.doctor._check import Finding
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._memory_plan import Rows, judge_memory, micro_batch_bytes, plan
from palaestra.trainer.doctor._model_size import ModelSize, UnknownSizeError, read_size
from tests.trainer.doctor_jobs import CPU, GPU
from tests.trainer.test_ledger import make_group

SIZE = ModelSize(
    num_parameters=1 << 20,
    num_layers=2,
    hidden_size=64,
    ffn_size=128,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=1000,
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
    assert (size.head_dim, size.num_heads, size.num_kv_heads, size.ffn_size) == (16, 4, 4, 256)
    tied = read_size(str(write_model(tmp_path, shapes, tie_word_embeddings=True, num_key_value_heads=2)))
    assert tied.num_parameters == 100 * 64 + 64
    assert tied.num_kv_heads == 2


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_damaged_model_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = write_model(tmp_path, {"embed.weight": [2, 2]})
    (folder / damage).write_bytes(b"\xff" * 16)
    with pytest.raises(ConfigError, match="cannot read the size of"):
        read_size(str(folder))


def test_weights_that_lie_there_twice_count_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {"embed.weight": [100, 64]})
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "consolidated.safetensors").write_bytes(weights)
    assert read_size(str(folder)).num_parameters == 100 * 64
    (folder / "model-00001-of-00001.safetensors").write_bytes(weights)
    index = {"weight_map": {"embed.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_size(str(folder)).num_parameters == 100 * 64


def test_models_of_another_layout_have_no_known_size(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {"embed.weight": [100, 64]})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnknownSizeError, match="no weights in model"):
        read_size(str(folder))
    layout = {"model_type": "gpt2", "n_head": 12, "n_embd": 768, "n_layer": 12, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(layout))
    with pytest.raises(UnknownSizeError, match="has no 'num_attention_heads'"):
        read_size(str(folder))


def test_run_folder_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CPU.with_disk_of(tmp_path / "runs" / "one").disk_place == f"the disk of {tmp_path}"
    with pytest.raises(ConfigError, match=r"the run's folder cannot be .*: File name too long; choose another one"):
        CPU.with_disk_of(tmp_path / ("x" * 300))

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        CPU.with_disk_of(tmp_path)


ROWS = Rows(longest=400, sampled_share=0.25)


def needs(
    config: GRPOConfig, size: ModelSize = SIZE, *, rows: Rows = ROWS, machine: Machine = CPU
) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {need.what: (need.mb, need.places) for need in plan(size, config, machine, rows, 100)}


def test_learner_takes_sixteen_bytes_a_parameter_and_a_copy_for_several_updates() -> None:
    one = needs(GRPOConfig())
    assert one["learner's weights, gradients and moments"] == (16, ("host",))
    assert one["environments"] == (100, ("host",))
    several = needs(GRPOConfig.parse({"learner": {"num_minibatches": 2}}))
    assert several["learner's weights, gradients and moments"] == (28, ("host",))


def test_three_sets_of_published_weights_lie_in_shared_memory_and_so_in_the_hosts() -> None:
    assert needs(GRPOConfig())["published weights"] == (12, ("host", "/dev/shm"))
    assert needs(GRPOConfig(steps=1))["published weights"] == (8, ("host", "/dev/shm"))
    on_disk = replace(CPU, publish_place="/tmp")
    assert needs(GRPOConfig(), machine=on_disk)["published weights"] == (12, ("/tmp",))


def test_logits_are_those_at_sampled_positions() -> None:
    config = GRPOConfig.parse({"learner": {"max_micro_batch_tokens": 1024}})
    saved = 2 * (24 * 64 + 16 * (2 + 2 * 2) * 32 + 16 * 128)
    wide = replace(SIZE, vocab_size=150_000)
    training = int(1024 * (saved + 0.25 * 10 * 150_000))
    canary = 800 * 10 * 150_000
    assert needs(config, wide)["micro-batch"][0] == -(-max(training, canary) >> 20)
    deep = replace(SIZE, num_layers=200)
    by_hand = 1024 * (100 * saved + 0.25 * 10 * 1000)
    assert needs(config, deep)["micro-batch"][0] == -(-int(by_hand) >> 20)


def test_rows_are_measured_where_something_was_played() -> None:
    trajectory = make_group(0).episodes[0].trajectory
    assert trajectory is not None
    rows = Rows.of([trajectory], 7, 512)
    assert rows == Rows(max(len(trajectory), 7), trajectory.num_sampled / len(trajectory))
    assert Rows.of([], 90, 512) == Rows(90, 1.0)
    assert Rows.of([], 0, 512) == Rows(512, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_plan_of_a_micro_batch_is_what_the_learner_takes(tmp_path: Path, precision: str) -> None:
    """What autograd keeps, counted tensor by tensor; the peak adds log-probabilities and the gradient of logits."""
    torch = pytest.importorskip("torch")
    from palaestra.trainer._policy_model import PolicyModel
    from palaestra.trainer.learner import LearnerConfig
    from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer

    folder = make_tokenizer(["a b c"] * 3, tmp_path, vocab_size=400)
    make_model(folder, TinyModelConfig(architecture="qwen3", start="random"), seed=0)
    config = LearnerConfig.parse({"precision": precision, "device": "cpu", "max_micro_batch_tokens": 512})
    model = PolicyModel(str(folder), config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_BP, at_N = np.zeros((2, 256), np.int64), np.arange(64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.logprobs(ids_BP, at_N % 2, at_N, np.zeros(64, np.int64), temperature=1.0)
    assert result.requires_grad
    train = GRPOConfig.parse({"learner": config.model_dump()})
    rows = Rows(longest=256, sampled_share=64 / 512)
    planned = micro_batch_bytes(read_size(str(folder)), train, rows, on_gpu=False)
    assert 0.9 < planned / sum(kept.values()) < 1.3


def test_engine_cache_by_engine_and_device() -> None:
    cpu = needs(GRPOConfig.parse({"engine_config": {"kv_cache_mb": 300}}))
    assert cpu["attention cache"] == (300, ("host",))
    assert cpu["engine's weights"] == (4, ("host",))
    gpu = needs(GRPOConfig.parse({"engine_config": {"gpu_memory_utilization": 0.25}}), machine=GPU)
    assert gpu["engine (its share of the GPU)"] == (20_000, ("GPU",))
    assert gpu["micro-batch"][1] == ("GPU",)
    transformers = {"engine": "transformers", "engine_config": {"max_model_len": 1024, "max_num_seqs": 8}}
    rows = needs(GRPOConfig.parse(transformers))
    assert rows["attention cache"] == (2 * 2 * 2 * 32 * 4 * 8 * 1024 >> 20, ("host",))


def judge(size: ModelSize = SIZE, machine: Machine = CPU, **train: object) -> Finding:
    return judge_memory(plan(size, GRPOConfig.parse(train), machine, ROWS, 100), machine)


def test_what_is_certain_fails_and_what_is_estimated_warns() -> None:
    assert judge().verdict is Verdict.OK
    finding = judge(BILLIONS)
    assert finding.verdict is Verdict.FAILURE
    assert "cannot fit. host: about" in finding.detail
    small = [need for need in plan(SIZE, GRPOConfig(), CPU, ROWS, 100) if "host" in need.places]
    total = sum(need.mb for need in small)
    certain = sum(need.mb for need in small if need.is_certain)
    assert "is tight" in judge(machine=replace(CPU, free_mb=total + 10)).detail
    finding = judge(machine=replace(CPU, free_mb=total - 10))
    assert finding.verdict is Verdict.WARNING
    assert "may not fit" in finding.detail
    assert judge(machine=replace(CPU, free_mb=certain - 1)).verdict is Verdict.FAILURE


def test_a_vocabulary_of_published_models_fails_no_healthy_job() -> None:
    qwen = ModelSize(
        num_parameters=596_000_000,
        num_layers=28,
        hidden_size=1024,
        ffn_size=3072,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
    )
    machine = replace(GPU, free_mb=16_000, gpu_free_mb=40_000, gpu_total_mb=40_000)
    train = {"engine_config": {"gpu_memory_utilization": 0.4}}
    finding = judge(qwen, machine, **train)
    assert finding.verdict is Verdict.OK, finding.detail


def test_small_shared_memory_is_a_failure_of_its_own() -> None:
    larger = replace(SIZE, num_parameters=8_000_000)
    finding = judge(larger, replace(CPU, publish_free_mb=64))
    assert finding.verdict is Verdict.FAILURE
    assert "/dev/shm: about 92 MB of 64 MB free (published weights 92)" in finding.detail
    assert "--shm-size" in finding.remedy
    assert judge(SIZE, replace(CPU, publish_free_mb=64)).verdict is Verdict.OK


def test_checkpoints_that_overfill_the_disk_are_a_failure() -> None:
    disk = replace(CPU, disk_place="the disk of /runs", disk_free_mb=130)
    assert judge(machine=disk, num_checkpoints=9).verdict is Verdict.WARNING  # 10 of 12 MB
    finding = judge(machine=disk, num_checkpoints=10)
    assert finding.verdict is Verdict.FAILURE
    assert "the disk of /runs: about 132 MB of 130 MB free (checkpoints 132)" in finding.detail
    assert "num_checkpoints" in finding.remedy
    assert judge(machine=disk, num_checkpoints=10, steps=50).verdict is Verdict.OK, "only five are ever due"


def test_the_gpu_is_a_place_of_its_own() -> None:
    finding = judge(BILLIONS, GPU, engine_config={"gpu_memory_utilization": 0.9})
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
    assert found.publish_free_mb > 0
    assert found.uses_gpu("auto")
    assert not found.uses_gpu("cpu")
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert not machine.look_at_machine().uses_gpu("auto")


def test_torch_without_cuda_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "2.13.0+cpu")
    assert machine.look_at_machine().gpu_total_mb == 0
