"""Whether engine and learner compute the same policy, on real conversations and on what the engine sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from palaestra.agents import Engine, Renderer
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.demonstrations import Demonstration, tokenize
from palaestra.trainer.doctor._check import Finding, failure, ok, skipped, warning
from palaestra.trainer.doctor._env_worker import Played
from palaestra.trainer.learner import Learner
from palaestra.trainer.sync import strain
from palaestra.types import Trajectory

_PER_ENV = 3
_NUM_SAMPLED = 12
_SHARE = 0.5


class Difference(NamedTuple):
    """Largest and mean absolute difference of log-probabilities, in nats, over so many tokens."""

    largest: float
    mean: float
    num_tokens: int


def conversations(played: Mapping[str, Played], renderer: Renderer, max_model_len: int) -> list[list[int]]:
    """A few of each expert's conversations as ids, cut to what the engine takes."""
    demonstrations = [
        Demonstration(task_id=e.task.id, messages=e.messages, tools=each.tools, is_success=e.is_success)
        for each in played.values()
        for e in each.episodes[:_PER_ENV]
        if e.turns
    ]
    return [t.ids.tolist()[:max_model_len] for t in tokenize(demonstrations, renderer) if len(t) > 1]


async def check_agreement(
    engine: Engine, learner: Learner, texts: Sequence[Sequence[int]], sampled: Sequence[Trajectory], config: GRPOConfig
) -> Finding:
    """Both sides' log-probabilities against `canary_tolerance`."""
    if not texts and not sampled:
        return skipped("there is no conversation to compare on")
    parts: list[tuple[str, Difference]] = []
    if texts:
        theirs, ours = await engine.score(texts), await learner.score(texts)
        parts.append(("tokens of conversations", difference(theirs, ours)))
    chosen = [t for t in sampled if t.num_sampled][:_NUM_SAMPLED]
    # the learner scores at temperature 1, and so does the engine only there
    if chosen and config.sampling.temperature == 1.0:
        ours = await learner.score([t.ids.tolist() for t in chosen])
        own = [scores[t.loss_mask[1:]] for scores, t in zip(ours, chosen, strict=True)]
        parts.append(("sampled tokens", difference([t.logprobs[t.loss_mask] for t in chosen], own)))
    return judge_difference(dict(parts), config)


def difference(theirs: Sequence[NDArray[np.float32]], ours: Sequence[NDArray[np.float32]]) -> Difference:
    """How far two lists of equally long arrays are from each other."""
    apart = np.concatenate([np.abs(a - b) for a, b in zip(theirs, ours, strict=True)])
    return Difference(float(apart.max()), float(apart.mean()), len(apart))


def judge_difference(parts: Mapping[str, Difference], config: GRPOConfig) -> Finding:
    """Against the tolerance, above which the run itself would stop at its first weights."""
    detail = ", ".join(f"{d.largest:.2g} on {d.num_tokens} {name}" for name, d in parts.items())
    detail = f"largest difference in nats: {detail}; allowed {config.canary_tolerance:g} on average, ten times at most"
    used = float(np.max([strain(d.mean, d.largest, config.canary_tolerance) for d in parts.values()]))
    dtype, precision = config.engine_config.dtype, config.learner.precision
    remedy = (
        f"set engine_config.dtype = 'float32' and learner.precision = 'float32' (now {dtype!r} and {precision!r}), "
        "or raise canary_tolerance if 16-bit arithmetic is meant"
    )
    if not used <= 1.0:
        return failure(detail, remedy)
    return warning(detail, remedy) if used > _SHARE else ok(detail)
