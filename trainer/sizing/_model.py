"""The step of the training loop, predicted from measurements.

With n turns and m sampled tokens per turn, B = groups_per_step * group_size episodes and X(k) turns per second with k
episodes under way (`_queue.py`):

    sync:      step = gen + learn + sync,  gen = the time in which `concurrency` slots play B episodes to their end
    one-step:  step = sync + max(gen + (1 - 1/e) * l * learn,  l * learn),  with the same gen
    async:     as one-step, with gen = n * sum over f < B of 1 / X(min(concurrency, (max_lag + 1) * B - f)), since what
               ended (f) is replaced after the step alone; of more slots than that, none is used

`sync` is measured with an idle engine for the first two and a busy one for async. `e` and `l` are the measured
slowdowns of engine and learner while both work: without any, and with a sync that takes
no time, async is max(gen, learn). The ideal is max(B n m / R, learn) with R the most tokens per second that the engine
made: environments, driver, weight sync and contention free, and nothing waiting. No prediction is below it.

    learn = epochs * sum over micro-batches of padded tokens * seconds per token + updates * seconds per update
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from palaestra.trainer.batch import pack_by_length
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.rollouts import most_in_hand
from palaestra.trainer.sizing._measured import EpisodeWork, Measurements
from palaestra.trainer.sizing._queue import drain_s, engine_rates, throughputs

_ORDER_SEED = 0

Mode = Literal["async", "one-step", "sync"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What of a job decides how long its step takes."""

    mode: Mode
    max_lag: int
    group_size: int
    groups_per_step: int
    concurrency: int
    micro_batch_tokens: int
    num_spare: int = 0
    num_epochs: int = 1
    num_minibatches: int = 1

    @property
    def num_episodes(self) -> int:
        """Episodes of a step."""
        return self.group_size * self.groups_per_step

    @property
    def most_slots(self) -> int:
        """Slots beyond which none is ever used: no more episodes are issued at a time."""
        return most_in_hand(
            group_size=self.group_size,
            groups_per_step=self.groups_per_step,
            max_lag=self.max_lag,
            num_spare=self.num_spare,
        )

    @property
    def num_updates(self) -> int:
        """Updates of a step; a minibatch without an episode makes none."""
        return self.num_epochs * min(self.num_minibatches, self.num_episodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One step in seconds. `wait_s` is what of the generation learning does not hide; `tokens` are those sampled."""

    step_s: float
    generation_s: float
    wait_s: float
    learn_s: float
    sync_s: float
    ideal_s: float
    tokens: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def setting_of(config: GRPOConfig) -> Setting:
    """What a configuration says."""
    return Setting(
        mode=config.mode,
        max_lag=config.max_lag,
        group_size=config.group_size,
        groups_per_step=config.groups_per_step,
        concurrency=config.concurrency,
        micro_batch_tokens=config.learner.max_micro_batch_tokens,
        num_spare=config.num_spare,
        num_epochs=config.learner.num_epochs,
        num_minibatches=config.learner.num_minibatches,
    )


def predict(measured: Measurements, setting: Setting) -> Prediction:
    """The step of `setting`; see the formula above."""
    slots = min(setting.concurrency, setting.most_slots)
    turns_per_s = episode_flow(measured, slots)
    batch = spread(measured.episodes, setting.num_episodes)
    work = _work(measured, batch)
    learn_s = learning_s(measured, setting, batch)
    tokens = setting.num_episodes * measured.turns_per_episode * measured.tokens_per_turn
    is_flowing = setting.mode == "async"
    sync_s = measured.busy_sync_s if is_flowing else measured.sync_s
    flow_s = _flow_s(measured, setting, turns_per_s) if is_flowing else drain_s(work, slots, turns_per_s)
    generation_s = flow_s * measured.overhead
    if setting.mode == "sync":
        step_s, wait_s = generation_s + learn_s + sync_s, generation_s
    else:
        learn_s *= measured.learner_slowdown
        stolen_s = learn_s * (1.0 - 1.0 / measured.engine_slowdown)
        step_s = sync_s + max(generation_s + stolen_s, learn_s)
        wait_s = step_s - learn_s - sync_s
    return Prediction(
        step_s=step_s,
        generation_s=generation_s,
        wait_s=wait_s,
        learn_s=learn_s,
        sync_s=sync_s,
        ideal_s=_ideal_s(measured, setting, batch, tokens),
        tokens=tokens,
    )


def episode_flow(measured: Measurements, slots: int) -> NDArray[np.float64]:
    """Turns per second with 1 to `slots` episodes under way, before the overhead."""
    rates = engine_rates(measured.engine, slots) / measured.tokens_per_turn
    # what the environment's own code costs this process is in both measurements: it is counted as the driver's
    env_s = max(0.0, measured.env_s_per_turn - measured.driver_s)
    return throughputs(rates, driver_s=measured.driver_s, env_s=env_s)


def learning_s(measured: Measurements, setting: Setting, batch: Sequence[EpisodeWork]) -> float:
    """Seconds of a step in a learner that has its cores for itself; each minibatch is packed by itself."""
    minibatches = np.array_split(np.array([episode.num_inputs for episode in batch]), setting.num_minibatches)
    padded = [size for lengths in minibatches for size in _padded(lengths.tolist(), setting.micro_batch_tokens)]
    tokens_s = math.fsum(size * _token_s(measured, size) for size in padded)
    return setting.num_epochs * tokens_s + setting.num_updates * measured.learner_update_s


def spread(episodes: Sequence[EpisodeWork], count: int) -> list[EpisodeWork]:
    """`count` episodes with the measured ones' spread of lengths, in a random order that is always the same."""
    ordered = sorted(episodes, key=lambda e: (e.num_turns, e.num_sampled))
    chosen = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    order = np.random.default_rng(_ORDER_SEED).permutation(count)
    return [chosen[i] for i in order]


def _work(measured: Measurements, batch: Sequence[EpisodeWork]) -> list[float]:
    """Length of each episode in mean turns, by the time that it would take alone; their mean is the measured one."""
    token_s = measured.engine[0].token_s
    alone_s = [e.num_sampled * token_s + e.env_s + e.num_turns * measured.driver_s for e in batch]
    mean_s = math.fsum(alone_s) / len(alone_s)
    return [seconds / mean_s * measured.turns_per_episode for seconds in alone_s]


def _flow_s(measured: Measurements, setting: Setting, turns_per_s: NDArray[np.float64]) -> float:
    """Seconds until as many episodes as a batch has ended, where the next ones are under way already."""
    under_way = setting.most_slots - np.arange(setting.num_episodes)
    flow = turns_per_s[np.minimum(under_way, len(turns_per_s)) - 1]
    return float(np.sum(measured.turns_per_episode / flow))


def _padded(lengths: Sequence[int], most: int) -> list[int]:
    """Padded tokens of each micro-batch of some rows."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [len(part) * lengths[part[-1]] for part in pack_by_length(order, lengths, most)]


def _token_s(measured: Measurements, size: int) -> float:
    levels = measured.learner
    return float(np.interp(size, [level.tokens for level in levels], [level.token_s for level in levels]))


def _ideal_s(measured: Measurements, setting: Setting, batch: Sequence[EpisodeWork], tokens: float) -> float:
    fastest = max(level.tokens_per_s for level in measured.engine)
    token_s = min(level.token_s for level in measured.learner)
    inputs = math.fsum(episode.num_inputs for episode in batch)
    learn_s = setting.num_epochs * inputs * token_s + setting.num_updates * measured.learner_update_s
    return max(tokens / fastest, learn_s)
