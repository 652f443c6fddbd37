"""Environments as the doctor sees them: planted leaks are found, rewards that pay anybody, crashes are one row."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from palaestra.envs import EnvLimits, EnvSuite
from palaestra.errors import TaskError, WorkerError
from palaestra.trainer._proc import inheritors
from palaestra.trainer.doctor import Verdict
from palaestra.trainer.doctor._census import Census
from palaestra.trainer.doctor._env_worker import Played, Stay
from palaestra.trainer.doctor._environments import judge_latency, judge_play, judge_reward, judge_stay, used_mb
from palaestra.trainer.doctor._marks import MARK
from palaestra.trainer.doctor._probe import EnvProbe
from palaestra.types import Episode, Failure, Outcome
from tests.trainer.doctor_jobs import ECHO, LEAKY, PLANTED, forget_plants, path_for_children, register_toys
from tests.trainer.test_ledger import make_group

register_toys()
STILL = Census(processes=1, descriptors=9, threads=1, leases=0, files=0, strays=frozenset(), own_mb=100, all_mb=120)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", path_for_children())
    yield
    forget_plants()


@pytest.fixture
async def probe_of(tmp_path: Path) -> AsyncIterator[Any]:
    opened: list[EnvProbe] = []

    def open_probe(env_id: str, **options: Any) -> EnvProbe:
        suite = EnvSuite({env_id: 1.0}, options={env_id: options})
        opened.append(EnvProbe(suite, tmp_path, concurrency=4, seed=0))
        return opened[-1]

    yield open_probe
    for probe in opened:
        await probe.aclose()


async def test_clean_environment_leaves_nothing(probe_of: Any) -> None:
    played, stay = await probe_of(LEAKY).play_rounds(LEAKY, 8, 60.0)
    finding = judge_stay(stay)
    assert finding.verdict is Verdict.OK, finding.detail
    assert "12 scored" in finding.detail, "in each round three of random calls and one of the expert"
    assert len(played.episodes) == 9
    assert len(played.seconds["begin"]) == len(played.seconds["end"]) == 9


async def test_rounds_are_of_one_kind_whatever_their_size(probe_of: Any) -> None:
    played, stay = await probe_of(LEAKY).play_rounds(LEAKY, 9, 60.0)
    assert stay.num_scored == 3 * (4 + 1)
    assert len(played.episodes) == 3 * 4, "the first way comes twice in each round"


@pytest.mark.parametrize(
    ("leak", "words"),
    [
        ("descriptors", "[78] open descriptors stay behind after 8 episodes"),
        ("processes", "[78] processes stay behind after 8 episodes"),
        ("threads", "[78] threads stay behind after 8 episodes"),
        ("files", "[78] files stay behind after 8 episodes"),
        ("nested", "[78] files stay behind after 8 episodes"),
        ("absolute", "[78] files stay behind after 8 episodes"),
        ("leases", "[78] sandbox leases stay behind after 8 episodes"),
        ("failure", "[123] open descriptors stay behind after 8 episodes"),
        ("success", "[12345] open descriptors stay behind after 8 episodes"),
        ("early", "1 open descriptors stay behind after 8 episodes"),
    ],
)
async def test_planted_leak_is_found(probe_of: Any, leak: str, words: str) -> None:
    _, stay = await probe_of(LEAKY, leak=leak).play_rounds(LEAKY, 8, 60.0)
    finding = judge_stay(stay)
    assert finding.verdict is Verdict.FAILURE
    assert re.search(words, finding.detail), finding.detail
    assert "end()" in finding.remedy


@pytest.mark.parametrize(("leak", "folder"), [("childs", "/tmp"), ("shared", "/dev/shm")])
async def test_what_others_may_have_left_in_common_folders_is_a_warning(probe_of: Any, leak: str, folder: str) -> None:
    _, stay = await probe_of(LEAKY, leak=leak).play_rounds(LEAKY, 8, 60.0)
    # other programs of this machine leave their own there meanwhile
    rounds = [
        replace(each, strays=frozenset(s for s in each.strays if PLANTED in f"/tmp/{Path(s).name}"))
        for each in stay.rounds
    ]
    finding = judge_stay(stay._replace(rounds=tuple(rounds)))
    assert finding.verdict is Verdict.WARNING
    assert f"8 new entries of common folders after 8 episodes, such as {folder}/palaestra-planted-" in finding.detail


async def test_environment_whose_every_episode_fails_proves_nothing(probe_of: Any) -> None:
    _, stay = await probe_of(LEAKY, leak="broken").play_rounds(LEAKY, 8, 60.0)
    finding = judge_stay(stay)
    assert finding.verdict is Verdict.SKIPPED
    assert "nothing was proved: none of 24 episodes was scored" in finding.detail
    assert "RuntimeError: the shop is closed" in finding.detail


@pytest.mark.slow
async def test_processes_that_left_the_family_are_found_and_ended_with_the_probe(probe_of: Any) -> None:
    probe = probe_of(LEAKY, leak="orphans")
    _, stay = await probe.play_rounds(LEAKY, 8, 60.0)
    assert re.search("[78] processes stay behind after 8 episodes", judge_stay(stay).detail)
    assert inheritors(MARK, probe.mark)
    await probe.aclose()
    assert inheritors(MARK, probe.mark) == set()


async def test_environment_that_kills_its_process_is_told_and_the_next_one_plays(probe_of: Any) -> None:
    probe = probe_of(LEAKY, leak="crash")
    with pytest.raises(WorkerError, match=r"the process of the environments ended with 3; its log ends: \(nothing\)"):
        await probe.play_rounds(LEAKY, 2, 60.0)
    with pytest.raises(WorkerError, match="ended with 3"):
        await probe.play_well(LEAKY, 2, 60.0)


async def test_expert_plays(probe_of: Any) -> None:
    probe = probe_of(LEAKY)
    played = await probe.play_well(LEAKY, 6, 60.0)
    assert played.is_expert
    assert all(episode.is_success for episode in played.episodes)
    assert [tool.name for tool in played.tools] == ["say", "stop"]


async def test_environment_without_an_expert_is_played_at_random(probe_of: Any) -> None:
    played = await probe_of(LEAKY, has_expert=False).play_well(LEAKY, 2, 60.0)
    assert not played.is_expert
    assert len(played.episodes) == 2


async def test_experts_that_are_slow_are_judged_by_what_ended_in_time(probe_of: Any) -> None:
    played = await probe_of(LEAKY, leak="slow").play_well(LEAKY, 400, 1.5)
    assert 0 < len(played.episodes) < 400
    assert judge_play(played, 0.25).verdict is Verdict.OK


async def test_no_episode_in_time_is_an_error(probe_of: Any) -> None:
    with pytest.raises(WorkerError, match=r"no episode of test/Leaky-v0 ended within 0\.5 s"):
        await probe_of(LEAKY, leak="stuck").play_well(LEAKY, 4, 0.5)


async def test_rounds_that_do_not_end_in_time_prove_nothing_and_are_judged_by_reward(probe_of: Any) -> None:
    played, stay = await probe_of(LEAKY, leak="slow").play_rounds(LEAKY, 8, 2.5)
    finding = judge_stay(stay)
    assert finding.verdict is Verdict.SKIPPED
    assert "of 3 rounds of 8 episodes ended in time" in finding.detail
    assert played.episodes


async def test_authors_error_is_told_with_its_place(probe_of: Any) -> None:
    with pytest.raises(WorkerError, match=r"nobody knows the way; its log ends: .*doctor_jobs\.py.* in expert"):
        await probe_of(LEAKY, leak="no call").play_well(LEAKY, 4, 60.0)


async def test_environment_without_training_tasks_is_refused_by_name(probe_of: Any) -> None:
    with pytest.raises(TaskError, match=r"test/Leaky-v0 has no training tasks: give it a num_tasks\['train'\]"):
        await probe_of(LEAKY, leak="no tasks").play_well(LEAKY, 4, 60.0)


async def test_failing_tasks_of_an_environment_without_an_expert_are_told(probe_of: Any) -> None:
    played = await probe_of(LEAKY, leak="some", has_expert=False).play_well(LEAKY, 10, 60.0)
    finding = judge_play(played, 0.25)
    assert finding.verdict is Verdict.WARNING
    assert "2 of 10 episodes of random play, for it ships no expert, failed on our side" in finding.detail
    assert "RuntimeError: the shop is closed on Sundays" in finding.detail
    finding = judge_reward(None, played)
    assert finding.verdict is Verdict.WARNING
    assert "2 episodes failed on our side, the first: RuntimeError: the shop is closed" in finding.detail


def play(reward: float, *, count: int = 8, is_solved: bool = False) -> Played:
    episode = replace(
        make_group(0).episodes[0], outcome=Outcome.SCORED, reward=reward, facts={"success": float(is_solved)}
    )
    return Played((episode,) * count, (), EnvLimits(), {}, 1.0)


def failed() -> Episode:
    failure = Failure(kind="SandboxError", message="no box to be had", boundary="env")
    episode = make_group(0).episodes[0]
    return replace(episode, outcome=Outcome.INFRA_ERROR, reward=None, terms=(), facts={}, failure=failure)


def test_reward_that_tells_play_apart_is_well() -> None:
    finding = judge_reward(play(1.1, is_solved=True), play(0.1))
    assert finding.verdict is Verdict.OK
    assert "expert 1.10 (100% solved" in finding.detail


def test_random_play_worth_as_much_as_the_experts_fails() -> None:
    finding = judge_reward(play(1.0, is_solved=True), play(1.0, is_solved=True))
    assert finding.verdict is Verdict.FAILURE
    assert "worth as much" in finding.detail


def test_few_random_episodes_fail_nobody() -> None:
    finding = judge_reward(play(1.0, is_solved=True), play(1.0, is_solved=True, count=7))
    assert finding.verdict is Verdict.WARNING
    assert "worth as much" in finding.detail
    unscored = play(0.1)._replace(episodes=(failed(),))
    assert judge_reward(play(1.0, is_solved=True), unscored).verdict is Verdict.WARNING


def test_expert_far_from_full_and_random_far_from_the_floor_are_warnings() -> None:
    assert judge_reward(play(0.5), play(0.1)).verdict is Verdict.WARNING
    finding = judge_reward(play(1.1, is_solved=True), play(0.9, is_solved=True))
    assert finding.verdict is Verdict.WARNING
    assert "random play mostly succeeds" in finding.detail


def test_reward_without_an_expert_is_skipped_and_without_a_score_fails() -> None:
    assert judge_reward(None, play(0.1)).verdict is Verdict.SKIPPED
    finding = judge_reward(None, play(0.1)._replace(episodes=(failed(),) * 8))
    assert finding.verdict is Verdict.FAILURE
    assert "SandboxError: no box to be had" in finding.detail


def test_environment_that_mostly_fails_cannot_be_played() -> None:
    finding = judge_play(play(1.0)._replace(episodes=(failed(), *play(1.0, count=2).episodes)), 0.25)
    assert finding.verdict is Verdict.FAILURE
    assert "1 of 3 episodes of random play" in finding.detail
    assert "no box to be had" in finding.detail
    assert judge_play(play(1.0), 0.25).verdict is Verdict.OK


def test_some_failed_episodes_are_a_warning_with_the_reason() -> None:
    expert = play(1.0, is_solved=True)
    finding = judge_reward(expert._replace(episodes=(*expert.episodes, failed())), play(0.1))
    assert finding.verdict is Verdict.WARNING
    assert "1 episodes failed on our side, the first: SandboxError: no box to be had" in finding.detail


def test_latency_tells_median_and_tail_and_warns_near_the_limit() -> None:
    limits = EnvLimits(tool_s=1.0, setup_s=10.0)
    quick = play(1.0)._replace(limits=limits, seconds={"begin": [0.1] * 10, "step": [0.01] * 10})
    finding = judge_latency([quick], 4)
    assert finding.verdict is Verdict.OK
    assert "reset 100 ms / 100 ms, step 10 ms / 10 ms" in finding.detail
    assert "8.0 episodes/s with 4 at once" in finding.detail
    slow = quick._replace(seconds={"step": [0.01] * 8 + [0.9] * 4})
    finding = judge_latency([slow], 4)
    assert finding.verdict is Verdict.WARNING
    assert "of the 1 s allowed" in finding.detail


def test_what_grows_once_is_no_leak_and_what_is_left_at_the_end_is() -> None:
    grown = replace(STILL, processes=5, descriptors=20)
    assert judge_stay(Stay(STILL, (STILL, grown, grown), STILL, 4, 9)).verdict is Verdict.OK
    finding = judge_stay(Stay(STILL, (grown, grown, grown), replace(STILL, processes=2), 4, 9))
    assert finding.verdict is Verdict.FAILURE
    assert "1 processes are left when the environment's parts are closed" in finding.detail


def test_memory_that_grows_with_every_round_is_a_warning() -> None:
    rounds = tuple(replace(STILL, own_mb=mb) for mb in (100, 200, 300))
    finding = judge_stay(Stay(STILL, rounds, STILL, 4, 9))
    assert finding.verdict is Verdict.WARNING
    assert "memory grows by 100 MB" in finding.detail
    assert used_mb(Stay(STILL, (replace(STILL, all_mb=150),), STILL, 4, 9)) == 50


def test_toys_are_registered_under_their_ids() -> None:
    assert EnvSuite({ECHO: 1.0, LEAKY: 1.0}).make(LEAKY).env_id == LEAKY
