"""The model of a step: hand-computed numbers, never below the ideal, never faster with slower environments."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.sizing import Measurements
from palaestra.trainer.sizing._measured import EngineLevel, EpisodeWork, LearnerLevel
from palaestra.trainer.sizing._model import Setting, learning_s, predict, setting_of, spread
from palaestra.trainer.sizing._queue import drain_s, engine_rates, throughputs


def episode(num_turns: int = 2, num_sampled: int = 20, num_inputs: int = 100, env_s: float = 0.0) -> EpisodeWork:
    return EpisodeWork(num_turns=num_turns, num_sampled=num_sampled, num_inputs=num_inputs, env_s=env_s)


def level(concurrency: int, tokens_per_s: float) -> EngineLevel:
    """A level whose rounds were all as fast."""
    return EngineLevel(concurrency=concurrency, tokens_per_s=tokens_per_s, worst_tokens_per_s=tokens_per_s)


def measurements(**changes: object) -> Measurements:
    """10 tokens a turn; one request makes 100 tokens a second, two or more 200; a learner of 1000 tokens a second."""
    values: dict[str, object] = {
        "player": "model",
        "context": 100,
        "episodes": (episode(),),
        "engine": (level(1, 100.0), level(2, 200.0)),
        "learner": (LearnerLevel(tokens=400, token_s=0.001),),
        "learner_update_s": 0.0,
        "sync_s": 0.5,
        "busy_sync_s": 0.5,
    }
    return Measurements(**(values | changes))  # type: ignore[arg-type]


def setting(mode: Literal["async", "one-step", "sync"] = "sync", **changes: int) -> Setting:
    values = {"max_lag": 0 if mode == "sync" else 1, "group_size": 2, "groups_per_step": 2, "concurrency": 2}
    return Setting(mode=mode, **{"micro_batch_tokens": 400, **values, **changes})


def test_synchronous_step_by_hand() -> None:
    # 4 episodes of 2 turns, two at a time, 20 turns a second in all: 0.4 s; 4 rows of 100 tokens: 0.4 s
    step = predict(measurements(), setting())
    assert step.generation_s == step.wait_s == pytest.approx(0.4)
    assert step.learn_s == pytest.approx(0.4)
    assert step.step_s == pytest.approx(0.4 + 0.4 + 0.5)
    assert step.tokens == 80
    assert step.ideal_s == pytest.approx(max(80 / 200, 0.4))


def test_asynchronous_step_is_the_slower_of_generation_and_learning() -> None:
    step = predict(measurements(busy_sync_s=0.0), setting("async", groups_per_step=4))
    assert step.step_s == pytest.approx(max(8 * 2 / 20, 0.8))
    slow = measurements(busy_sync_s=0.0, learner=(LearnerLevel(tokens=400, token_s=0.002),))
    step = predict(slow, setting("async"))
    assert step.step_s == pytest.approx(0.8)
    assert step.wait_s == pytest.approx(0.0)
    assert step.generation_s == pytest.approx(0.4)


def test_one_step_plays_every_batch_to_its_end_while_the_last_one_is_learned() -> None:
    uneven = measurements(episodes=(episode(num_turns=1, num_sampled=10), episode(num_turns=3, num_sampled=30)))
    chosen = setting("one-step", groups_per_step=1)
    # two slots: 10 turns a second each; the longer episode is alone for the last two thirds of its turns
    assert predict(uneven, chosen).generation_s == pytest.approx(0.1 + 0.2)
    assert predict(uneven, chosen).step_s == pytest.approx(0.5 + 0.3)
    assert predict(uneven, setting("async", groups_per_step=1)).generation_s == pytest.approx(4 / 20)


def test_slots_that_finished_are_filled_again_only_after_the_step() -> None:
    # one slot for each of the 4 episodes that may be in hand; the engine makes 10 turns a second for each episode
    wide = measurements(busy_sync_s=0.0, engine=(level(1, 100.0), level(4, 400.0)))
    step = predict(wide, setting("async", groups_per_step=1, concurrency=64))
    assert step.generation_s == pytest.approx(2 / 40 + 2 / 30)


@pytest.mark.parametrize(
    ("mode", "changes", "most"),
    [("sync", {}, 8), ("one-step", {}, 16), ("async", {"max_lag": 2}, 24), ("async", {"num_spare": 1}, 24)],
)
def test_most_slots_are_what_the_loop_has_in_hand(mode: str, changes: dict[str, int], most: int) -> None:
    config = GRPOConfig.parse({"mode": mode, "group_size": 2, "groups_per_step": 4, **changes})
    assert setting_of(config).most_slots == most


def test_contention_takes_from_the_engine_what_learning_costs() -> None:
    # learning takes 1.5 * 0.4 = 0.6 s, in which the engine works at half its speed: 0.4 + 0.3 s to generate
    step = predict(measurements(engine_slowdown=2.0, learner_slowdown=1.5, busy_sync_s=0.25), setting("async"))
    assert step.learn_s == pytest.approx(0.6)
    assert step.step_s == pytest.approx(0.25 + 0.7)
    assert step.wait_s == pytest.approx(0.1)
    assert predict(measurements(engine_slowdown=2.0, learner_slowdown=1.5), setting()).learn_s == pytest.approx(0.4)


def test_overhead_lengthens_generation_alone() -> None:
    step = predict(measurements(overhead=1.5), setting())
    assert step.generation_s == pytest.approx(0.6)
    assert step.learn_s == pytest.approx(0.4)


def test_throughput_of_one_and_two_episodes_by_hand() -> None:
    # engine 0.1 s a turn whatever it holds, environment 0.1 s: alone 1 / 0.2; two: G = 1, 0.2, 0.025
    flow = throughputs(np.array([10.0, 10.0]), driver_s=0.0, env_s=0.1)
    assert flow == pytest.approx([5.0, 0.2 / (0.01 + 0.01 + 0.005)])
    # three stations in a row that take one at a time, were the environment a driver
    assert throughputs(np.array([10.0, 10.0]), driver_s=0.1, env_s=0.0) == pytest.approx([5.0, 0.2 / 0.03])


def test_throughput_of_a_thousand_episodes_stays_a_number() -> None:
    flow = throughputs(np.linspace(1.0, 100.0, 1000), driver_s=1e-4, env_s=5.0)
    assert np.all(np.isfinite(flow))
    assert flow[-1] <= 100.0


def test_the_last_episodes_drain_slowly() -> None:
    # one turn a second alone, two with two under way: 1 s together, then the longer one's 2 turns alone
    assert drain_s([1.0, 3.0], 2, np.array([1.0, 2.0])) == pytest.approx(1.0 + 2.0)
    # with one slot, the sum; with a third episode waiting it takes the place of the first
    assert drain_s([1.0, 3.0], 1, np.array([1.0])) == pytest.approx(4.0)
    assert drain_s([1.0, 3.0, 2.0], 2, np.array([1.0, 2.0])) == pytest.approx(3.0)


def test_engine_rates_are_interpolated_without_the_noise() -> None:
    levels = tuple(level(c, r) for c, r in ((1, 10.0), (4, 50.0), (6, 30.0)))
    # four requests cannot each be faster than one alone, and six not slower than four in all
    assert engine_rates(levels, 7) == pytest.approx([10.0, 20.0, 30.0, 40.0, 40.0, 40.0, 40.0])
    assert engine_rates(levels[1:2], 5) == pytest.approx([12.5, 25.0, 37.5, 50.0, 50.0])


def test_learning_counts_padding_updates_and_epochs() -> None:
    measured = measurements(learner_update_s=0.1)
    rows = [episode(num_inputs=50), episode(num_inputs=100), episode(num_inputs=200)]
    # packs of at most 200 padded tokens: (50, 100) padded to 200, and 200
    once = setting(micro_batch_tokens=200)
    assert learning_s(measured, once, rows) == pytest.approx(0.4 + 0.1)
    assert learning_s(measured, replace(once, num_epochs=2), rows) == pytest.approx(0.8 + 0.2)


def test_minibatches_are_packed_each_by_itself() -> None:
    measured = measurements(learner_update_s=0.1)
    rows = [episode(num_inputs=length) for length in (50, 200, 100, 200)]
    whole = setting(micro_batch_tokens=400)
    # together (50, 100, 200) would not fit, so (50, 100) and (200, 200); by halves twice (x, 200), padded to 400
    assert learning_s(measured, whole, rows) == pytest.approx(0.2 + 0.4 + 0.1)
    assert learning_s(measured, replace(whole, num_minibatches=2), rows) == pytest.approx(0.8 + 0.2)
    # more minibatches than rows: those without a row make no update
    assert learning_s(measured, replace(whole, num_minibatches=6), rows) == pytest.approx(0.55 + 0.4)


def test_a_batch_has_the_measured_spread_of_lengths() -> None:
    measured = [episode(num_turns=turns) for turns in (3, 1, 2)]
    assert sorted(e.num_turns for e in spread(measured, 6)) == [1, 1, 2, 2, 3, 3]
    assert [e.num_turns for e in spread(measured, 1)] == [2]
    assert spread(measured, 6) == spread(measured, 6)


episodes_st = st.lists(
    st.builds(
        EpisodeWork,
        num_turns=st.integers(1, 9),
        num_sampled=st.integers(9, 400),
        num_inputs=st.integers(10, 3000),
        env_s=st.floats(0, 20),
    ),
    min_size=1,
    max_size=8,
).map(tuple)
speeds = st.floats(1.0, 1e4)
factors = st.floats(1.0, 4.0)
measured_st = st.builds(
    Measurements,
    player=st.just("model"),
    context=st.just(512),
    episodes=episodes_st,
    engine=st.tuples(speeds, speeds, speeds).map(
        lambda rates: tuple(level(c, r) for c, r in zip((1, 4, 16), rates, strict=True))
    ),
    learner=st.tuples(speeds, speeds).map(
        lambda rates: tuple(LearnerLevel(tokens=t, token_s=1 / r) for t, r in zip((512, 2048), rates, strict=True))
    ),
    learner_update_s=st.floats(0, 2),
    sync_s=st.floats(0, 2),
    busy_sync_s=st.floats(0, 2),
    driver_s=st.floats(0, 0.1),
    overhead=factors,
    engine_slowdown=factors,
    learner_slowdown=factors,
)
settings_st = st.builds(
    setting,
    st.sampled_from(("sync", "one-step", "async")),
    group_size=st.integers(2, 6),
    groups_per_step=st.integers(1, 6),
    concurrency=st.integers(1, 48),
    micro_batch_tokens=st.integers(1, 5000),
    num_epochs=st.integers(1, 2),
    num_minibatches=st.integers(1, 8),
    num_spare=st.integers(0, 2),
)


@settings(max_examples=150)
@given(measured_st, settings_st)
def test_no_prediction_is_below_the_ideal(measured: Measurements, chosen: Setting) -> None:
    step = predict(measured, chosen)
    assert step.step_s >= step.ideal_s * (1 - 1e-9)
    assert step.step_s == pytest.approx(step.wait_s + step.learn_s + step.sync_s)
    assert min(step.generation_s, step.learn_s, step.ideal_s) > 0


@settings(max_examples=150)
@given(measured_st, settings_st, st.floats(0, 5))
def test_slower_environments_never_make_a_step_faster(measured: Measurements, chosen: Setting, more_s: float) -> None:
    # the same spread of lengths: every episode waits longer in the same proportion of its own time alone
    slower = replace(measured, episodes=tuple(_longer(measured, e, more_s) for e in measured.episodes))
    assert predict(slower, chosen).step_s >= predict(measured, chosen).step_s * (1 - 1e-9)


def _longer(measured: Measurements, one: EpisodeWork, more_s: float) -> EpisodeWork:
    alone_s = one.num_sampled * measured.engine[0].token_s + one.env_s + one.num_turns * measured.driver_s
    return replace(one, env_s=one.env_s + more_s * alone_s)


@settings(max_examples=100)
@given(measured_st, settings_st, factors, factors)
def test_contention_never_makes_a_step_faster(
    measured: Measurements, chosen: Setting, engine: float, learner: float
) -> None:
    worse = replace(
        measured,
        engine_slowdown=measured.engine_slowdown * engine,
        learner_slowdown=measured.learner_slowdown * learner,
    )
    assert predict(worse, chosen).step_s >= predict(measured, chosen).step_s * (1 - 1e-9)
