"""The supervised stage: masks, order, gate, determinism, and the worker process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from palaestra.agents.renderers import family_of
from palaestra.errors import ConfigError, WorkerError
from palaestra.trainer import _sft_worker as worker
from palaestra.trainer._sft_gate import WeightAverage, message_accuracy
from palaestra.trainer.sft import SFTConfig, SFTJob, run_sft
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from palaestra.types import Trajectory

SMALL = TinyModelConfig(num_layers=2, ffn_size=64, max_positions=64)
FAST = SFTConfig(max_steps=200, batch_size=8, lr=1e-2, warmup_steps=5, probe_every=10)


def trajectory(ids: list[int], mask: list[int]) -> Trajectory:
    loss_mask = np.asarray(mask, bool)
    return Trajectory(
        ids=np.asarray(ids, np.int32),
        loss_mask=loss_mask,
        logprobs=np.zeros(len(ids), np.float32),
        versions=np.where(loss_mask, 0, -1).astype(np.int32),
        turns=np.where(loss_mask, 0, -1).astype(np.int16),
    )


def recitals(count: int) -> list[Trajectory]:
    """Whatever the prompt of two tokens, the reply is 300 301 8; lengths vary with the prompt's padding."""
    return [trajectory([2, 20 + k, *[9] * (k % 3), 300, 301, 8], [0, 0, *[0] * (k % 3), 1, 1, 1]) for k in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(make_tokenizer(["a"], tmp_path / "base"), SMALL, seed=0)


def job(model: Path, output: Path, config: SFTConfig = FAST) -> SFTJob:
    output.mkdir()
    train, probe = tuple(recitals(24)), tuple(recitals(10))
    return SFTJob(model=model, output=output, train=train, probe=probe, config=config, progress=output / "sft.jsonl")


def test_labels_are_the_reply_tokens_alone() -> None:
    row = worker.to_row(trajectory([5, 6, 7, 8], [0, 1, 0, 1]))
    assert row == {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}


def test_tokens_outside_the_mask_get_no_gradient(model: Path, tmp_path: Path) -> None:
    """The head's gradient on row v is sum over trained positions of (p(v) - [v is the label]) times the state."""
    trainer = worker.make_trainer(job(model, tmp_path / "out"))
    network = trainer.model
    head = torch.nn.Linear(128, network.config.vocab_size, bias=False)
    head.weight.data.copy_(network.get_input_embeddings().weight.data)
    network.set_output_embeddings(head)  # untied, so that only predictions reach the head's gradient
    batch = {"input_ids": torch.tensor([[2, 20, 300, 9, 301]]), "labels": torch.tensor([[-100, -100, 300, -100, 301]])}
    torch.autograd.backward(trainer.compute_loss(network, batch))
    with torch.no_grad():
        states = network.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state[0]
        expected = torch.zeros_like(head.weight)
        for position, label in ((1, 300), (3, 301)):
            share = head(states[position]).softmax(-1)
            share[label] -= 1
            expected += torch.outer(share, states[position]) / 2
    torch.testing.assert_close(head.weight.grad, expected, atol=1e-6, rtol=1e-4)


def test_padding_and_prompt_tokens_do_not_change_the_loss(model: Path, tmp_path: Path) -> None:
    trainer = worker.make_trainer(job(model, tmp_path / "out"))
    one = {"input_ids": torch.tensor([[2, 20, 300]]), "labels": torch.tensor([[-100, -100, 300]])}
    padded = {"input_ids": torch.tensor([[2, 20, 300, 0, 0]]), "labels": torch.tensor([[-100, -100, 300, -100, -100]])}
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in (one, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_batches_hold_similar_lengths_and_every_pass_has_every_index() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, size=640).tolist()
    sampler = worker.LengthBatches(lengths, 32, seed=0)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(640))
    assert first != second
    spread = np.mean([np.ptp([lengths[index] for index in first[k : k + 32]]) for k in range(0, 640, 32)])
    assert spread < 40  # at random it is about 85


def test_the_gate_stops_at_the_target_and_says_so(model: Path, tmp_path: Path) -> None:
    result = worker.train(job(model, tmp_path / "out"))
    assert result.reason == "probe_target"
    assert result.has_learned
    assert result.steps < 200
    assert result.probes[-1].accuracy >= 0.98
    assert all(point.accuracy < 0.98 for point in result.probes[:-1])


def test_progress_is_one_json_line_for_each_log_and_probe(model: Path, tmp_path: Path) -> None:
    result = worker.train(job(model, tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe" in line] == [point.step for point in result.probes]
    assert all({"step", "seconds"} <= line.keys() for line in lines)


@pytest.mark.parametrize(
    ("limits", "reason"), [({"max_steps": 3}, "max_steps"), ({"max_seconds": 0.01}, "max_seconds")]
)
def test_without_success_the_limit_is_told(model: Path, tmp_path: Path, limits: dict[str, float], reason: str) -> None:
    result = worker.train(job(model, tmp_path / "out", FAST.model_copy(update=limits)))
    assert result.reason == reason
    assert not result.has_learned
    assert len(result.probes) == 1  # the last step is always probed


def test_the_same_seed_gives_the_same_weights(model: Path, tmp_path: Path) -> None:
    short = FAST.model_copy(update={"max_steps": 6})
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        worker.train(job(model, folder, short.model_copy(update={"seed": seed})))
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_a_message_counts_only_when_all_its_tokens_are_right(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        greedy = int(network(torch.tensor([[2, 20]])).logits[0, -1].argmax())
        after = int(network(torch.tensor([[2, 20, greedy]])).logits[0, -1].argmax())
    right = trajectory([2, 20, greedy, after], [0, 0, 1, 1])
    half_right = trajectory([2, 20, greedy, (after + 1) % 100], [0, 0, 1, 1])
    two_messages = replace(half_right, turns=np.asarray([-1, -1, 0, 1], np.int16))
    assert message_accuracy(network, [right]) == 1.0
    assert message_accuracy(network, [half_right]) == 0.0
    assert message_accuracy(network, [two_messages]) == 0.5
    assert message_accuracy(network, [right, half_right, two_messages]) == 0.5


def test_the_average_forgets_slowly_and_leaves_the_model_as_it_was(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)
    weight = network.get_input_embeddings().weight.data
    weight.fill_(0.0)
    average = WeightAverage(network, 0.5)
    for value, expected in ((11.0, 10.0), (4.0, 4 + 6 / 6), (2.0, 2 + 3 * 3 / 13)):
        weight.fill_(value)
        average.update()  # memory is min(0.5, n / (n + 10)): 1/11, 2/12, 3/13
        with average.in_place():
            assert weight[0, 0].item() == pytest.approx(expected)
        assert weight[0, 0].item() == value
    average.apply()
    assert weight[0, 0].item() == pytest.approx(2 + 9 / 13)


def test_the_saved_model_keeps_its_chat_template_and_family(model: Path, tmp_path: Path) -> None:
    described = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(described | {"palaestra": {"family": "qwen3"}}))
    for name in ("chat_template.jinja", "merges.txt"):
        (model / name).write_text("kept")
    worker.train(job(model, tmp_path / "out", FAST.model_copy(update={"max_steps": 1})))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "kept"
    assert (tmp_path / "out" / "merges.txt").read_text() == "kept"
    assert family_of(tmp_path / "out") == "qwen3"


async def test_run_sft_refuses_what_cannot_be_learned(model: Path, tmp_path: Path) -> None:
    silent = [trajectory([1, 2], [0, 0])] * 10
    with pytest.raises(ConfigError, match="probe has no reply token"):
        await run_sft(model, tmp_path / "out", recitals(24), silent, FAST)
    with pytest.raises(ConfigError, match="fewer than batch_size"):
        await run_sft(model, tmp_path / "out", recitals(4), recitals(4), FAST)


@pytest.mark.slow
async def test_the_worker_trains_in_its_own_process(model: Path, tmp_path: Path) -> None:
    result = await run_sft(model, tmp_path / "out", recitals(24), recitals(10), FAST)
    assert result.has_learned
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.slow
async def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, WorkerError), match="nowhere"):
        await run_sft(tmp_path / "nowhere", tmp_path / "out", recitals(24), recitals(10), FAST)
