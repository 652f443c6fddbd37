"""From measurements to a proposal: which settings, why, and what the step then takes.

Rules, in order: of the modes in which the engine works as it was measured, the fastest (of equal ones that with less
lag) if it gains 5 %, and more than rounds of one load differed by, and the machine was quiet, else the one that is set;
the micro-batch that learns fastest of those that fit, if that gains 5 %; the fewest episode slots within 2 % of the
fastest step (the knee); no more threads than cores. The batch stays the user's, because it decides what is learned:
what another one would cost is a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.losses import is_clipped
from palaestra.trainer.sizing._measured import GpuMemory, Measurements
from palaestra.trainer.sizing._model import Prediction, Setting, predict, setting_of

_WORTH_A_MODE = 0.05
_WORTH_A_SIZE = 0.05
_WORTH_A_SLOT = 0.02
_STILL_RISING = 1.1
_LEAST_SCATTER = 0.01
_IDLE_ENGINE = 0.6
_CHEAP_DOUBLING = 1.7

_GPU_KEY = "train.engine_config.gpu_memory_utilization"
_THREAD_KEYS = ("train.engine_config.threads", "train.learner.threads")
_SPLIT_KEYS = (*_THREAD_KEYS, _GPU_KEY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting: its key in the job's file, its value now and proposed (the same where it stays), and why."""

    key: str
    now: Any
    proposed: Any
    why: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"key": self.key, "now": self.now, "proposed": self.proposed, "why": self.why}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What to set, and the predicted step now, as proposed, and at its best in each possible mode."""

    changes: tuple[Change, ...]
    now: Prediction
    proposed: Prediction
    by_mode: Mapping[str, tuple[Setting, Prediction]]
    notes: tuple[str, ...]

    @property
    def assignments(self) -> dict[str, Any]:
        """The keys that change, dotted, with their new values."""
        return {change.key: change.proposed for change in self.changes if change.proposed != change.now}

    @property
    def is_as_measured(self) -> bool:
        """Whether engine and learner keep the cores and the memory with which they were measured."""
        return not self.assignments.keys() & set(_SPLIT_KEYS)


def propose(measured: Measurements, config: GRPOConfig) -> Proposal:
    """A proposal for `config`, on whose parts the measurements were made."""
    now = setting_of(config)
    modes = _modes(now, config)
    by_mode = {mode: _best(measured, setting) for mode, setting in modes.items() if _is_measured(mode, config)}
    chosen, proposed = _choose_mode(measured, now, by_mode)
    now_step = predict(measured, now)
    split = _split_changes(measured, config)
    changes = [
        *_mode_changes(now, chosen, by_mode),
        _concurrency_change(measured, now, chosen),
        *_request_changes(config, chosen),
        *_batch_rows(now),
        _micro_batch_change(measured, now, chosen),
        *split,
    ]
    return Proposal(
        changes=tuple(changes),
        now=now_step,
        proposed=proposed,
        by_mode=by_mode,
        notes=(
            *measured.notes,
            *_limits(measured, config, [mode for mode in modes if mode not in by_mode]),
            *_unknown_split(split),
            *_hints(measured, config, chosen, proposed),
        ),
    )


def _modes(now: Setting, config: GRPOConfig) -> dict[str, Setting]:
    """The setting in each mode that its loss allows."""
    modes = {"sync": replace(now, mode="sync", max_lag=0)}
    if is_clipped(config.learner.loss.name):
        modes["one-step"] = replace(now, mode="one-step", max_lag=1)
        modes["async"] = replace(now, mode="async", max_lag=max(1, now.max_lag))
    return modes


def _is_measured(mode: str, config: GRPOConfig) -> bool:
    """Whether the engine works in that mode as it does in the one that was measured."""
    return config.model_copy(update={"mode": mode}).engine_settings == config.engine_settings


def _best(measured: Measurements, setting: Setting) -> tuple[Setting, Prediction]:
    setting = replace(setting, micro_batch_tokens=_best_micro_batch(measured, setting))
    setting = replace(setting, concurrency=_knee(measured, setting))
    return setting, predict(measured, setting)


def _best_micro_batch(measured: Measurements, setting: Setting) -> int:
    """The measured size that learns fastest; the present one where no other gains anything worth a change.

    Sizes below the longest conversation, or the present size, are for where memory takes no others: they bound nothing.
    """
    least = min(measured.context, setting.micro_batch_tokens)
    fitting = {level.tokens for level in measured.learner}
    sizes = {size for size in fitting if size >= least} or fitting
    if setting.micro_batch_tokens <= max(fitting):
        sizes.add(setting.micro_batch_tokens)
    learn_s = {size: predict(measured, replace(setting, micro_batch_tokens=size)).learn_s for size in sorted(sizes)}
    best = min(learn_s, key=lambda size: learn_s[size])
    kept = learn_s.get(setting.micro_batch_tokens, math.inf)
    return setting.micro_batch_tokens if kept <= (1 + _WORTH_A_SIZE) * learn_s[best] else best


def _knee(measured: Measurements, setting: Setting) -> int:
    """The fewest slots within 2 % of the fastest step; the present number where it is about as small."""
    most = setting.most_slots
    counts = sorted({*(2**power for power in range(most.bit_length())), min(setting.concurrency, most), most})
    step_s = {count: predict(measured, replace(setting, concurrency=count)).step_s for count in counts}
    limit_s = (1 + _WORTH_A_SLOT) * min(step_s.values())
    knee = next(count for count in counts if step_s[count] <= limit_s)
    present = setting.concurrency
    return present if knee <= present <= 2 * knee and step_s.get(present, math.inf) <= limit_s else knee


def _choose_mode(
    measured: Measurements, now: Setting, by_mode: Mapping[str, tuple[Setting, Prediction]]
) -> tuple[Setting, Prediction]:
    fastest = min(by_mode.values(), key=lambda best: best[1].step_s)
    kept = by_mode[now.mode]
    least = max(_WORTH_A_MODE, measured.scatter)
    is_worth_it = fastest[1].step_s < (1 - least) * kept[1].step_s
    return fastest if is_worth_it and not measured.is_disturbed else kept


def _mode_changes(now: Setting, chosen: Setting, by_mode: Mapping[str, tuple[Setting, Prediction]]) -> list[Change]:
    times = ", ".join(f"{mode} {step.step_s:.2f} s" for mode, (_, step) in sorted(by_mode.items()))
    rows = [Change(key="train.mode", now=now.mode, proposed=chosen.mode, why=f"predicted step: {times}")]
    if chosen.max_lag != now.max_lag:
        rows.append(Change(key="train.max_lag", now=now.max_lag, proposed=chosen.max_lag, why="goes with the mode"))
    return rows


def _concurrency_change(measured: Measurements, now: Setting, chosen: Setting) -> Change:
    before = predict(measured, replace(chosen, concurrency=now.concurrency)).step_s
    after = predict(measured, chosen).step_s
    if chosen.concurrency == now.concurrency:
        why = "at the knee"
    elif chosen.concurrency == chosen.most_slots < now.concurrency:
        why = f"no more than {chosen.most_slots} episodes are issued at a time"
    elif chosen.concurrency < now.concurrency:
        gain = f"more slots gain under {_WORTH_A_SLOT:.0%}"
        why = f"{gain}: {now.concurrency} would take {before:.2f} s a step, {after:.2f} s here"
    else:
        why = f"the knee: {after:.2f} s a step instead of {before:.2f} s"
    return Change(key="train.concurrency", now=now.concurrency, proposed=chosen.concurrency, why=why)


def _request_changes(config: GRPOConfig, chosen: Setting) -> list[Change]:
    """A limit that was set for more episodes than are played now is never reached."""
    engine = config.engine_config
    if "max_num_seqs" not in engine.model_fields_set or engine.max_num_seqs <= chosen.concurrency:
        return []
    key, why = "train.engine_config.max_num_seqs", "an episode has one request at a time"
    return [Change(key=key, now=engine.max_num_seqs, proposed=chosen.concurrency, why=why)]


def _batch_rows(now: Setting) -> list[Change]:
    why = "yours: it decides what is learned"
    return [
        Change(key=f"train.{name}", now=getattr(now, name), proposed=getattr(now, name), why=why)
        for name in ("groups_per_step", "group_size")
    ]


def _micro_batch_change(measured: Measurements, now: Setting, chosen: Setting) -> Change:
    key, size = "train.learner.max_micro_batch_tokens", chosen.micro_batch_tokens
    if size == now.micro_batch_tokens:
        why = "no other measured size that holds a whole conversation learns noticeably faster"
    elif now.micro_batch_tokens > max(level.tokens for level in measured.learner):
        why = "the largest size that fitted into memory"
    else:
        before = predict(measured, replace(chosen, micro_batch_tokens=now.micro_batch_tokens)).learn_s
        why = f"learning takes {predict(measured, chosen).learn_s:.2f} s instead of {before:.2f} s"
    return Change(key=key, now=now.micro_batch_tokens, proposed=size, why=why)


def _split_changes(measured: Measurements, config: GRPOConfig) -> list[Change]:
    now = (config.engine_config.threads, config.learner.threads)
    split = split_cores(*now, num_cores=measured.num_cores)
    why = "fits the cores" if split == now else f"together more than {measured.num_cores} cores"
    changes = [Change(key=key, now=a, proposed=b, why=why) for key, a, b in zip(_THREAD_KEYS, now, split, strict=True)]
    if measured.gpu_memory is not None:
        present = config.engine_config.gpu_memory_utilization
        share = share_of_gpu(measured.gpu_memory, now=present)
        changes.append(
            Change(key=_GPU_KEY, now=present, proposed=share, why="what the learner's peak leaves, less 5 %")
        )
    return changes


def split_cores(engine: int, learner: int, *, num_cores: int) -> tuple[int, int]:
    """Threads of engine and learner: as asked for while they fit, else in that proportion, and one at least."""
    if engine + learner <= num_cores or (engine, learner) == (1, 1):
        return engine, learner
    share = max(1, min(num_cores - 1, round(num_cores * engine / (engine + learner))))
    return share, max(1, num_cores - share)


def share_of_gpu(memory: GpuMemory, *, now: float) -> float:
    """The engine's share of a GPU beside the learner, in [0.1, 0.9], to two digits; `now`, the present, if within 0.05.

    What is neither free nor the engine's share was the learner's.
    """
    learner = 1.0 - memory.free_mb / memory.total_mb - now
    share = round(min(0.9, max(0.1, 0.95 - learner)), 2)
    return now if abs(share - now) <= 0.05 else share


def _limits(measured: Measurements, config: GRPOConfig, apart: Sequence[str]) -> list[str]:
    """What the prediction does not hold for; `apart` are modes in which the engine works otherwise."""
    notes = []
    if measured.is_disturbed:
        notes.append(
            f"other work used up to {measured.other_cores:.1f} cores: the prediction is for a machine as busy as this "
            "one was, and no other mode is proposed"
        )
    if measured.scatter >= _LEAST_SCATTER:
        notes.append(
            f"rounds of one load differed by up to {measured.scatter:.0%}: the predicted seconds are no surer than "
            "that, and no other mode is proposed for less; --seconds measures longer"
        )
    if apart:
        notes.append(
            f"{' and '.join(apart)}: the engine works otherwise there (batch_invariant) than it was measured; measure "
            f"by itself with --set train.mode={apart[-1]}"
        )
    if config.num_spare:
        notes.append(f"the {config.num_spare} spare episodes of each group are not in the prediction")
    if config.drop_zero_variance:
        notes.append("groups that are replaced because their rewards agree are not in the prediction")
    return notes


def _unknown_split(split: Sequence[Change]) -> list[str]:
    """That no time is predicted for cores and memory which the parts did not have."""
    changed = [change.key for change in split if change.proposed != change.now]
    if not changed:
        return []
    return [f"all times are for the present {' and '.join(changed)}: measure again with the proposed"]


def _hints(measured: Measurements, config: GRPOConfig, chosen: Setting, step: Prediction) -> list[str]:
    """What could be tried, but is not proposed."""
    notes = []
    limit = config.engine_config.max_num_seqs
    if _is_still_rising(measured) and limit <= chosen.concurrency and limit < chosen.most_slots:
        notes.append(f"the engine still gets faster at {limit} requests: raise max_num_seqs and measure again")
    fastest = max(level.tokens_per_s for level in measured.engine)
    used = step.tokens / fastest / step.step_s
    larger = replace(chosen, groups_per_step=2 * chosen.groups_per_step, concurrency=2 * chosen.concurrency)
    factor = predict(measured, larger).step_s / step.step_s
    if used < _IDLE_ENGINE and factor < _CHEAP_DOUBLING:
        notes.append(
            f"the engine is used to {used:.0%}: twice the groups ({larger.groups_per_step}) in twice the slots would "
            f"take {factor:.2f} times the step; a larger batch learns differently, so this is yours to decide"
        )
    return notes


def _is_still_rising(measured: Measurements) -> bool:
    """Whether even the slower round with the most requests beats the better one with fewer."""
    levels = measured.engine
    return len(levels) > 1 and levels[-1].worst_tokens_per_s > _STILL_RISING * levels[-2].tokens_per_s
