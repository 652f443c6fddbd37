"""The contract of every local engine, on real engines and tiny models. One start per engine and module."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from palaestra.agents._engine import Completion, EngineStats, Sampling
from palaestra.agents.engines import EngineConfig, open_engine
from palaestra.agents.engines._process import ProcessEngine
from palaestra.errors import ContextFullError, PolicyError
from tests.agents.engines.conftest import MAX_MODEL_LEN, VOCAB_SIZE, Forward, TinyModel, require_library

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CLOSE = 1e-4
NUM_SLOTS = 8


class Served:
    """An engine that several tests share, and the next free weight version."""

    def __init__(self, engine: ProcessEngine) -> None:
        self.engine = engine
        self.version = 0

    async def load(self, model: TinyModel) -> int:
        self.version += 1
        await self.engine.load_weights(model.folder, self.version)
        return self.version

    async def until_tokens(self, num_tokens: int) -> None:
        while (await self.engine.stats()).tokens < num_tokens:
            pass

    async def sample(self, prompt: Sequence[int], *, seed: int | None = 0, **options: float) -> Completion:
        return await self.engine.generate(prompt, Sampling.parse({"max_tokens": 12, **options}), stop_ids=[], seed=seed)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["transformers", "vllm"])
async def served(
    request: pytest.FixtureRequest, model_a: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    require_library(request.param)
    config = EngineConfig(max_model_len=MAX_MODEL_LEN, max_num_seqs=NUM_SLOTS, kv_cache_mb=32, device="cpu")
    log_path = tmp_path_factory.mktemp("engine") / f"{request.param}.log"
    async with await open_engine(request.param, model_a.folder, config, log_path) as engine:
        yield Served(engine)


def prompt_of(length: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, VOCAB_SIZE, length).tolist()
    return ids


def logprobs_of(forward: Forward, ids: Sequence[int], temperature: float = 1.0) -> NDArray[np.float64]:
    """Log-probability of ids[1:] each, given what stands before."""
    logits = forward(ids)[:-1].astype(np.float64) / temperature
    normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    chosen: NDArray[np.float64] = logits[np.arange(len(ids) - 1), list(ids[1:])] - normaliser
    return chosen


def assert_exact(forward: Forward, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> None:
    expected = logprobs_of(forward, [*prompt, *completion.ids.tolist()], temperature)[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_those_of_the_distribution_drawn_from(
    served: Served, model_a: TinyModel, temperature: float
) -> None:
    await served.load(model_a)
    prompts = [prompt_of(length, length) for length in (1, 5, 31, 32, 33, 70, 100, 40, 64, 90)]
    async with asyncio.TaskGroup() as group:
        calls = [
            group.create_task(served.sample(prompt, seed=index, temperature=temperature))
            for index, prompt in enumerate(prompts)
        ]
    for prompt, call in zip(prompts, calls, strict=True):
        assert_exact(model_a.forward, prompt, call.result(), temperature)


async def test_nucleus_sampling_draws_and_reports_within_the_nucleus(served: Served, model_a: TinyModel) -> None:
    await served.load(model_a)
    prompt = prompt_of(20, 1)
    for seed in range(8):
        completion = await served.sample(prompt, seed=seed, top_p=0.5)
        ids = [*prompt, *completion.ids.tolist()]
        for position, logprob in enumerate(completion.logprobs, start=len(prompt)):
            probs = np.exp(model_a.forward(ids[:position])[-1].astype(np.float64))
            probs /= probs.sum()
            ranked = np.argsort(-probs)
            nucleus = ranked[: int(np.searchsorted(np.cumsum(probs[ranked]), 0.5)) + 1]
            assert ids[position] in nucleus
            assert logprob == pytest.approx(np.log(probs[ids[position]] / probs[nucleus].sum()), abs=CLOSE)


async def test_greedy_takes_the_most_likely_token(served: Served, model_a: TinyModel) -> None:
    await served.load(model_a)
    prompt = prompt_of(40, 2)
    first = await served.sample(prompt, temperature=0.0)
    again = await served.sample(prompt, seed=99, temperature=0.0)
    assert first.ids.tolist() == again.ids.tolist()
    ids = [*prompt, *first.ids.tolist()]
    best = model_a.forward(ids).argmax(-1)[len(prompt) - 1 : -1]
    assert first.ids.tolist() == best.tolist()
    assert_exact(model_a.forward, prompt, first)


async def test_a_seed_fixes_the_completion_whatever_runs_beside_it(served: Served) -> None:
    prompt = prompt_of(30, 3)
    alone = await served.sample(prompt, seed=7)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(served.sample(prompt_of(10 + i, i), seed=i)) for i in range(6)]
        same = group.create_task(served.sample(prompt, seed=7))
        calls += [group.create_task(served.sample(prompt, seed=100 + i)) for i in range(6)]
    assert same.result().ids.tolist() == alone.ids.tolist()
    assert len({tuple(call.result().ids.tolist()) for call in calls[6:]}) > 1


async def test_requests_without_a_seed_differ(served: Served) -> None:
    prompt = prompt_of(30, 4)
    completions = [await served.sample(prompt, seed=None) for _ in range(4)]
    assert len({tuple(c.ids.tolist()) for c in completions}) == 4


async def test_a_stop_token_ends_the_completion_and_is_part_of_it(served: Served) -> None:
    prompt = prompt_of(30, 5)
    free = await served.sample(prompt, seed=1)
    stop = int(free.ids[4])
    end = free.ids.tolist().index(stop) + 1
    stopped = await served.engine.generate(prompt, Sampling(max_tokens=12), stop_ids=[stop], seed=1)
    assert stopped.ids.tolist() == free.ids[:end].tolist()
    assert (stopped.stop_reason, free.stop_reason) == ("stop", "length")
    assert stopped.ids.dtype == np.int32
    assert stopped.logprobs.dtype == np.float32
    assert stopped.versions.dtype == np.int32


async def test_later_turns_that_extend_a_prompt_stay_exact(served: Served, model_a: TinyModel) -> None:
    await served.load(model_a)

    async def converse(seed: int) -> None:
        ids = prompt_of(45, 500)  # a common start: prefixes are shared between conversations too
        for turn in range(4):
            completion = await served.sample(ids, seed=seed)
            assert_exact(model_a.forward, ids, completion)
            ids += [*completion.ids.tolist(), *prompt_of(8, turn)]

    async with asyncio.TaskGroup() as group:
        for seed in range(2 * NUM_SLOTS):
            group.create_task(converse(seed))


async def test_score_agrees_with_a_forward_pass_up_to_full_length(served: Served, model_a: TinyModel) -> None:
    await served.load(model_a)
    sequences = [prompt_of(length, length) for length in (1, 2, 33, 64, MAX_MODEL_LEN)]
    scores = await served.engine.score([*sequences, *sequences])
    for sequence, score in zip([*sequences, *sequences], scores, strict=True):
        assert score.shape == (len(sequence) - 1,)
        np.testing.assert_allclose(score, logprobs_of(model_a.forward, sequence), atol=CLOSE)
    assert await served.engine.score([]) == []


_LONG = 400
"""Tokens of a request that is still running when the weights change, however slow the machine is to say so."""


async def test_weights_change_between_two_tokens_of_running_requests(
    served: Served, model_a: TinyModel, model_b: TinyModel
) -> None:
    old = await served.load(model_a)
    prompts = [prompt_of(20 + i, i) for i in range(NUM_SLOTS)]
    before = (await served.engine.stats()).tokens
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(served.sample(p, seed=i, max_tokens=_LONG)) for i, p in enumerate(prompts)]
        await served.until_tokens(before + 3 * NUM_SLOTS)
        new = await served.load(model_b)
        late = group.create_task(served.sample(prompts[0], seed=1))
    for prompt, call in zip(prompts, calls, strict=True):
        completion = call.result()
        assert len(completion.ids) == _LONG
        assert set(completion.versions.tolist()) == {old, new}
        assert np.all(np.diff(completion.versions) >= 0)
        num_old = int((completion.versions == old).sum())
        expected = logprobs_of(model_a.forward, [*prompt, *completion.ids[:num_old].tolist()])[len(prompt) - 1 :]
        np.testing.assert_allclose(completion.logprobs[:num_old], expected, atol=CLOSE)
    assert late.result().versions.tolist() == [new] * 12
    assert_exact(model_b.forward, prompts[0], late.result())


async def test_no_cached_prefix_survives_a_weight_load(served: Served, model_a: TinyModel, model_b: TinyModel) -> None:
    prompt = prompt_of(100, 6)
    for model in (model_a, model_b, model_a):
        version = await served.load(model)
        completion = await served.sample(prompt, seed=3)
        assert completion.versions.tolist() == [version] * 12
        assert_exact(model.forward, prompt, completion)


async def test_cancelled_requests_stop_and_free_their_places(served: Served) -> None:
    started = await served.engine.stats()
    async with asyncio.TaskGroup() as group:
        for index in range(3 * NUM_SLOTS):
            _long_request(group, served, index)
    before = await served.engine.stats()
    async with asyncio.TaskGroup() as group:
        calls = [_long_request(group, served, i) for i in range(3 * NUM_SLOTS)]
        await served.until_tokens(before.tokens + 1)
        for call in calls:
            call.cancel()
    await served.sample(prompt_of(20, 7))
    await served.engine.stats()  # one more step clears the finished request away
    after = await served.engine.stats()
    assert after.requests - before.requests <= NUM_SLOTS + 1, "none but those that had a place before the call"
    assert after.busy_s - before.busy_s < (before.busy_s - started.busy_s) / 2  # the sample queued behind nothing
    settled = await _settled(served)
    assert settled.tokens == after.tokens
    for _ in range(5):
        assert await served.engine.stats() == settled  # nothing runs on


async def test_scores_are_served_before_requests_that_wait_for_a_place(served: Served) -> None:
    before = await served.engine.stats()
    async with asyncio.TaskGroup() as group:
        calls = [_long_request(group, served, index) for index in range(4 * NUM_SLOTS)]
        await served.until_tokens(before.tokens + 1)
        await served.engine.score([prompt_of(40, 8), prompt_of(50, 9)])
        assert (await served.engine.stats()).requests - before.requests <= NUM_SLOTS
        for call in calls:
            call.cancel()
    await _settled(served)


async def _settled(served: Served) -> EngineStats:
    """The totals once two looks in a row agree: the step under way may add to the busy time."""
    async with asyncio.timeout(30):
        last = await served.engine.stats()
        while (now := await served.engine.stats()) != last:
            last = now
        return last


def _long_request(group: asyncio.TaskGroup, served: Served, index: int) -> asyncio.Task[Completion]:
    return group.create_task(served.sample(prompt_of(20, index), seed=index, max_tokens=130))


async def test_versions_must_rise(served: Served, model_a: TinyModel) -> None:
    version = await served.load(model_a)
    for stale in (version, version - 1):
        with pytest.raises(PolicyError, match=f"version {version} is loaded"):
            await served.engine.load_weights(model_a.folder, stale)
    assert (await served.engine.stats()).version == version


async def test_weights_that_do_not_fit_change_nothing(
    served: Served, model_a: TinyModel, model_b: TinyModel, tmp_path: Path
) -> None:
    version = await served.load(model_a)
    tensors = load_file(model_b.folder / "model.safetensors")
    name = sorted(tensors)[-1]
    cut, missing = tmp_path / "cut", tmp_path / "missing"
    for folder, kept in ((cut, {**tensors, name: tensors[name][:-1]}), (missing, {**tensors})):
        if folder == missing:
            del kept[name]
        folder.mkdir()
        save_file(kept, folder / "model.safetensors")
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "model.safetensors").write_bytes(b"not a tensor file")
    for folder, reason in (
        (cut, "has shape"),
        (missing, "is missing"),
        (garbage, "cannot read"),
        (tmp_path, "no model"),
    ):
        with pytest.raises(PolicyError, match=reason):
            await served.engine.load_weights(folder, version + 1)
    completion = await served.sample(prompt_of(50, 8))
    assert set(completion.versions.tolist()) == {version}
    assert_exact(model_a.forward, prompt_of(50, 8), completion)


async def test_only_the_published_bytes_are_loaded(served: Served, model_a: TinyModel, model_b: TinyModel) -> None:
    version = await served.load(model_a)
    checksum = hashlib.sha256((model_b.folder / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(PolicyError, match="are not the published ones"):
        await served.engine.load_weights(model_a.folder, version + 1, checksum)
    assert (await served.engine.stats()).version == version
    await served.engine.load_weights(model_b.folder, version + 1, checksum)
    served.version += 1
    assert_exact(model_b.forward, prompt_of(20, 3), await served.sample(prompt_of(20, 3)))


async def test_bad_prompts_are_refused_and_the_engine_goes_on(served: Served) -> None:
    with pytest.raises(ContextFullError, match=f"prompt of {MAX_MODEL_LEN} tokens"):
        await served.sample([5] * MAX_MODEL_LEN)
    for prompt, reason in (([], "at least one"), ([3, VOCAB_SIZE], "outside"), ([-1], "outside")):
        with pytest.raises(PolicyError, match=reason):
            await served.sample(prompt)
    with pytest.raises(PolicyError, match="cannot score"):
        await served.engine.score([[5] * (MAX_MODEL_LEN + 1)])
    capped = await served.sample([5] * (MAX_MODEL_LEN - 3), max_tokens=50)
    assert len(capped.ids) == 3
    assert capped.stop_reason == "length"


async def test_weights_saved_in_half_precision_load(served: Served, model_b: TinyModel, tmp_path: Path) -> None:
    tensors = load_file(model_b.folder / "model.safetensors")
    shutil.copy(model_b.folder / "config.json", tmp_path)
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    await served.load(TinyModel(tmp_path, model_b.forward))
    prompt = prompt_of(30, 9)
    completion = await served.sample(prompt)
    expected = logprobs_of(model_b.forward, [*prompt, *completion.ids.tolist()])[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=0.05)
