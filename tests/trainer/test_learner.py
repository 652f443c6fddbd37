"""The learner: against a plain torch reference, over save and load, through files, and when it is killed.

Most tests call the service in this process; one pays for a real learner process.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from palaestra.agents.renderers import family_of
from palaestra.errors import ConfigError, StepRefusedError, WorkerError
from palaestra.trainer._learner_worker import LearnerService, build
from palaestra.trainer._policy_model import PolicyModel
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import LearnerConfig, LearnerSetup, LocalLearner
from palaestra.trainer.losses import LossConfig
from palaestra.types import Trajectory

VOCAB = 48
SINGLE = LearnerConfig(learning_rate=1e-2, device="cpu")
SMOOTH_EPSILON = 1e-3  # Adam's first step is nearly the sign of the gradient, which turns rounding into 1e-5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    layout = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(layout).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def service(folder: Path, config: LearnerConfig = SINGLE) -> LearnerService:
    torch.set_num_threads(config.threads)
    return LearnerService(PolicyModel(str(folder), config), config)


def make_rows(seed: int = 0, count: int = 6) -> list[TrainRow]:
    """Rows of unequal length with scattered sampled tokens, slightly off policy."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(4, 20))
        mask = rng.random(length) < 0.4
        mask[0], mask[2] = False, True
        trajectory = Trajectory(
            ids=rng.integers(0, VOCAB, length).astype(np.int32),
            loss_mask=mask,
            logprobs=np.where(mask, rng.normal(-3.9, 0.3, length), 0.0).astype(np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
            turns=np.where(mask, 0, -1).astype(np.int16),
        )
        rows.append(TrainRow(trajectory=trajectory, advantage=float(rng.normal())))
    return rows


def weights(learner: LearnerService) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner._model.parameters().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def reference_logprobs(network: Any, trajectory: Trajectory, temperature: float = 1.0) -> Tensor:
    """Log-probs of tokens 1..T-1, one row at a time, over the whole vocabulary."""
    ids = torch.tensor(trajectory.ids[None].astype(np.int64))
    logits: Tensor = network(ids).logits[0, :-1]
    return (logits / temperature).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def reference_step(folder: Path, rows: Sequence[TrainRow], temperature: float) -> tuple[dict[str, Tensor], float]:
    """PPO with the token mean over the batch, written out; the new weights and the gradient's norm."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=SMOOTH_EPSILON, weight_decay=0.0
    )
    losses = []
    for row in rows:
        mask = torch.tensor(row.trajectory.loss_mask[1:])
        behaviour = torch.tensor(row.trajectory.logprobs[1:])[mask]
        ratio = (reference_logprobs(network, row.trajectory, temperature)[mask] - behaviour).exp()
        surrogate = torch.min(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
        if row.advantage < 0:
            surrogate = torch.max(surrogate, torch.full_like(surrogate, 3.0 * row.advantage))
        losses.append(-surrogate)
    torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
    optimizer.step()
    return {name: p.detach() for name, p in network.named_parameters()}, norm


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_one_step_equals_a_plain_reference(model_folder: Path, temperature: float, max_tokens: int) -> None:
    rows = make_rows()
    changes = {"temperature": temperature, "max_micro_batch_tokens": max_tokens, "epsilon": SMOOTH_EPSILON}
    config = SINGLE.model_copy(update=changes)
    learner = service(model_folder, config)
    report = learner.step(rows)
    expected, norm = reference_step(model_folder, rows, temperature)
    for name, tensor in weights(learner).items():
        np.testing.assert_allclose(tensor.numpy(), expected[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert report.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert report.version == 1
    assert report.seconds > 0


def test_tokens_outside_the_mask_and_after_the_last_sampled_one_contribute_nothing(model_folder: Path) -> None:
    rows = make_rows(count=2)
    changed = []
    for row in rows:
        t = row.trajectory
        tail = np.concatenate([t.ids, np.arange(5, dtype=np.int32)])
        mask = np.concatenate([t.loss_mask, np.zeros(5, dtype=bool)])
        logprobs = np.where(mask, np.pad(t.logprobs, (0, 5)), -7.0).astype(np.float32)
        versions, turns = np.pad(t.versions, (0, 5), constant_values=-1), np.pad(t.turns, (0, 5), constant_values=-1)
        trajectory = Trajectory(ids=tail, loss_mask=mask, logprobs=logprobs, versions=versions, turns=turns)
        changed.append(replace(row, trajectory=trajectory))
    one, other = service(model_folder), service(model_folder)
    assert one.step(rows).metrics == other.step(changed).metrics
    assert_same(weights(one), weights(other))


def test_same_seed_gives_the_same_bits(model_folder: Path) -> None:
    config = SINGLE.model_copy(update={"num_minibatches": 2, "num_epochs": 2})
    one, other = service(model_folder, config), service(model_folder, config)
    for seed in range(3):
        assert one.step(make_rows(seed)).metrics == other.step(make_rows(seed)).metrics
    assert_same(weights(one), weights(other))


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_load_continues_bit_for_bit(model_folder: Path, tmp_path: Path, num_minibatches: int) -> None:
    config = SINGLE.model_copy(update={"num_minibatches": num_minibatches, "warmup_updates": 5})
    unbroken = service(model_folder, config)
    unbroken.step(make_rows(0))
    unbroken.save(tmp_path / "checkpoint")
    resumed = service(model_folder, config)
    assert resumed.load(tmp_path / "checkpoint") == 1
    for seed in (1, 2):
        expected, found = unbroken.step(make_rows(seed)), resumed.step(make_rows(seed))
        assert found.metrics == expected.metrics
        assert found.version == expected.version
    assert_same(weights(resumed), weights(unbroken))


def test_warm_up_is_linear_then_constant(model_folder: Path) -> None:
    learner = service(model_folder, SINGLE.model_copy(update={"warmup_updates": 2, "learning_rate": 1e-3}))
    rates = [learner.step(make_rows(seed)).metrics["learning_rate"] for seed in range(3)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_weight_decay_spares_vectors(model_folder: Path) -> None:
    plain = service(model_folder)
    decayed = service(model_folder, SINGLE.model_copy(update={"weight_decay": 0.1}))
    start = weights(plain)
    plain.step(make_rows())
    decayed.step(make_rows())
    for name, tensor in weights(plain).items():
        shrunk = tensor - 1e-3 * start[name] if tensor.dim() > 1 else tensor
        torch.testing.assert_close(weights(decayed)[name], shrunk, rtol=0, atol=1e-6)


def test_nan_advantage_refuses_the_step_and_changes_nothing(model_folder: Path) -> None:
    learner = service(model_folder)
    learner.step(make_rows(0))
    before = weights(learner)
    rows = make_rows(1)
    rows[3] = replace(rows[3], advantage=math.nan)
    with pytest.raises(StepRefusedError, match="step refused at version 1, weights unchanged: row 3 has advantage nan"):
        learner.step(rows)
    assert_same(weights(learner), before)
    assert learner.step(make_rows(1)).version == 2


@pytest.mark.parametrize("num_minibatches", [1, 3])
def test_overflowing_loss_refuses_the_step_and_changes_nothing(model_folder: Path, num_minibatches: int) -> None:
    loss = LossConfig(name="importance")
    config = SINGLE.model_copy(update={"num_minibatches": num_minibatches, "loss": loss})
    learner, control = service(model_folder, config), service(model_folder, config)
    for each in (learner, control):
        each.step(make_rows(0))
    rows = make_rows(1)
    rows[5].trajectory.logprobs[:] = -20.0
    rows[5] = replace(rows[5], advantage=1e38)  # finite, until the ratio multiplies it
    with pytest.raises(StepRefusedError, match=r"weights unchanged: the loss is -?(inf|nan) on rows \[.*\]"):
        learner.step(rows)
    assert_same(weights(learner), weights(control))
    assert learner.step(make_rows(2)).metrics == control.step(make_rows(2)).metrics
    assert_same(weights(learner), weights(control))


def test_overflowing_gradient_refuses_the_step(model_folder: Path) -> None:
    learner = service(model_folder, SINGLE.model_copy(update={"max_micro_batch_tokens": 10_000}))
    before = weights(learner)
    rows = [replace(row, advantage=1e37) for row in make_rows(0)]
    with pytest.raises(StepRefusedError, match="weights unchanged: the gradient's norm is"):
        learner.step(rows)
    assert_same(weights(learner), before)


def test_recomputed_proximal_is_the_policy_before_the_first_update(model_folder: Path) -> None:
    loss = LossConfig(name="decoupled_tis")
    learner = service(model_folder, SINGLE.model_copy(update={"loss": loss, "num_epochs": 2}))
    rows = make_rows(0)
    for row, filled in zip(rows, learner._with_proximal(rows), strict=True):
        mask = row.trajectory.loss_mask
        expected = reference_logprobs(learner_network(model_folder), row.trajectory).detach().numpy()[mask[1:]]
        assert filled.proximal_T is not None
        np.testing.assert_allclose(filled.proximal_T[mask], expected, rtol=0, atol=1e-5)
    assert learner.step(rows).metrics["kl"] > 0


def learner_network(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_score_equals_a_full_forward_pass_at_temperature_one(model_folder: Path) -> None:
    learner = service(model_folder, SINGLE.model_copy(update={"temperature": 0.5, "max_micro_batch_tokens": 30}))
    rows = make_rows(0)
    scores = learner.score([*(row.trajectory.ids.tolist() for row in rows), [7], []])
    network = learner_network(model_folder)
    for row, score in zip(rows, scores, strict=False):
        expected = reference_logprobs(network, row.trajectory).detach().numpy()
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-5)
    assert [len(score) for score in scores[-2:]] == [0, 0]


@pytest.mark.parametrize("is_new", [True, False])
def test_published_weights_load_exactly(model_folder: Path, tmp_path: Path, is_new: bool) -> None:
    learner = service(model_folder)
    folder = tmp_path / "slot"
    if not is_new:
        learner.publish(folder)
    learner.step(make_rows())
    published = learner.publish(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert published.checksum == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert published.version == 1
    assert_same(dict(learner_network(folder).named_parameters()), weights(learner))
    assert [path.name for path in tmp_path.iterdir()] == ["slot"]


def test_publish_survives_the_leftovers_of_a_killed_process(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "slot.tmp").mkdir()
    (tmp_path / "slot.tmp" / "half.safetensors").write_bytes(b"half")
    service(model_folder).publish(tmp_path / "slot")
    assert sorted(path.name for path in (tmp_path / "slot").iterdir()) == ["config.json", "model.safetensors"]


def test_export_is_a_model_folder_with_its_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    learner = service(model_folder)
    learner.step(make_rows())
    learner.export(tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.json").read_text() == "{}"
    assert_same(dict(learner_network(tmp_path / "export").named_parameters()), weights(learner))


def test_export_says_the_chat_family_of_its_source(model_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    shutil.copytree(model_folder, snapshot)
    service(snapshot).export(tmp_path / "export")
    assert family_of(tmp_path / "export") == "qwen3"


def test_bad_checkpoints_are_refused_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    learner = service(model_folder)
    with pytest.raises(ConfigError, match="no learner checkpoint in"):
        learner.load(tmp_path)
    (tmp_path / "learner.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="is damaged") as raised:
        learner.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_bad_model_folders_are_refused_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ConfigError, match="does not load") as raised:
        service(tmp_path)
    assert "\n" not in str(raised.value)
    tensors = load_file(model_folder / "model.safetensors")
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    save_file(
        {n: t for n, t in tensors.items() if "layers.1" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"lacks \d+ weights, the first is model\.layers\.1"):
        service(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"model\.safetensors does not load"):
        service(tmp_path)


@pytest.mark.slow
async def test_learner_process_steps_as_the_service_does_and_dies_loudly(model_folder: Path, tmp_path: Path) -> None:
    reference = service(model_folder)
    async with await LocalLearner.start(model_folder, SINGLE, log_path=tmp_path / "learner.log") as learner:
        report = await learner.step(make_rows(0))
        assert report.metrics == reference.step(make_rows(0)).metrics
        assert learner.version == report.version == 1
        published = await learner.publish(tmp_path / "slot")
        assert published == reference.publish(tmp_path / "reference")
        with pytest.raises(StepRefusedError, match="row 0 has advantage nan"):
            await learner.step([replace(make_rows(1)[0], advantage=math.nan)])
        await learner.save(tmp_path / "checkpoint")
        await learner.step(make_rows(1))
        await learner.load(tmp_path / "checkpoint")
        assert learner.version == 1
        async with asyncio.timeout(10):
            os.kill(learner.pid, signal.SIGSTOP)  # or it might be done before it is killed
            stepping = asyncio.create_task(learner.step(make_rows(2)))
            await asyncio.sleep(0)
            os.kill(learner.pid, signal.SIGKILL)
            with pytest.raises(WorkerError, match="learner was killed by SIGKILL"):
                await stepping
        with pytest.raises(WorkerError, match="learner was killed by SIGKILL"):
            await learner.score([[1, 2]])


async def test_missing_model_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such model folder: .*absent$"):
        await LocalLearner.start(tmp_path / "absent", SINGLE, log_path=tmp_path / "learner.log")
    with pytest.raises(ConfigError, match=r"is not a model folder: it has no config\.json$"):
        await LocalLearner.start(tmp_path, SINGLE, log_path=tmp_path / "learner.log")
    assert not (tmp_path / "learner.log").exists()


def test_loss_module_that_the_process_cannot_import_is_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot import the loss's module 'no_such_module'"):
        build(LearnerSetup(str(model_folder), SINGLE, "no_such_module"))
