"""What is judged of an environment: reward of expert and random play, latency, and what stays behind.

Pure functions of what the probing process measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from palaestra.trainer.doctor._census import Census
from palaestra.trainer.doctor._check import Finding, failure, ok, skipped, together, warning
from palaestra.trainer.doctor._env_worker import Played, Stay
from palaestra.types import Episode

_FULL, _FLOOR = 0.95, 0.5
_SLOW_SHARE = 0.5
_MANY_MB = 64
_LEAST_SCORED = 8
"""Random episodes, below which their mean reward proves nothing."""
_LEAST_ROUNDS = 3
_SHOWN = 2
_KEPT = ("descriptors", "threads")
"""What libraries may open or start once more and keep for the life of the process."""
_READABLE = {"begin": "reset", "step": "step", "verify": "judge", "end": "end"}
_KINDS = {
    "processes": ("processes", "end what begin() started in end(), also after an error"),
    "threads": ("threads", "end or join every thread in end()"),
    "descriptors": ("open descriptors", "close files, sockets and pipes in end()"),
    "leases": ("sandbox leases", "close every sandbox and tab in end(); `palaestra sandbox list` shows them"),
    "files": ("files", "remove what the environment writes in end()"),
}


def judge_play(played: Played, max_failure_rate: float) -> Finding:
    """Whether the environment can be played here, as often as a run asks for."""
    who = "its expert" if played.is_expert else "random play, for it ships no expert,"
    tools = ", ".join(tool.name for tool in played.tools) or "none"
    detail = f"{len(played.episodes)} episodes of {who} in {played.wall_s:.1f} s; tools: {tools}"
    if not (failed := _failed(played.episodes)):
        return ok(detail)
    told = f"{len(failed)} of {len(played.episodes)} episodes of {who} failed on our side, the first: {failed[0]}"
    if len(failed) > max_failure_rate * len(played.episodes):
        return failure(told, "mend what it names")
    return warning(told, "mend what it names")


def judge_reward(expert: Played | None, random: Played) -> Finding:
    """Whether the reward tells good play from any play."""
    for who, played in (("expert", expert), ("random", random)):
        if played is not None and not _rewards(played.episodes):
            detail = f"no {who} episode was scored: {_why_unscored(played.episodes)}"
            is_proved = len(played.episodes) >= _LEAST_SCORED
            return (failure if is_proved else warning)(detail, "mend the environment")
    failed = _failed(random.episodes)
    if expert is None:
        detail = f"ships no expert to compare with; random play: {_summary(random)}"
        if failed:
            told = f"{len(failed)} episodes failed on our side, the first: {failed[0]}"
            return warning(f"{told}; {detail}", "mend what it names")
        return skipped(detail)
    detail = f"expert {_summary(expert)}, random {_summary(random)}"
    findings = []
    if _mean(random) >= _mean(expert):
        told = f"random play is worth as much as the expert's: {detail}"
        if len(_rewards(random.episodes)) >= _LEAST_SCORED:
            return failure(told, "mend the reward or its terms")
        findings.append(warning(told, f"look again with more episodes: {_LEAST_SCORED} or more prove it"))
    if _success(expert) < _FULL:
        findings.append(warning(f"the expert is far from full: {detail}", "see which tasks it fails, and why"))
    if _success(random) > _FLOOR:
        findings.append(
            warning(f"random play mostly succeeds: {detail}", "make the tasks harder, or the check stricter")
        )
    if failed := [*_failed(expert.episodes), *failed]:
        told = f"{len(failed)} episodes failed on our side, the first: {failed[0]}"
        findings.append(warning(told, "mend what it names"))
    return together(findings, detail)


def judge_latency(played: Sequence[Played], concurrency: int) -> Finding:
    """Median and 90th percentile, against the environment's own limits."""
    parts, findings = [], []
    limits = played[0].limits
    allowed_s = {"begin": limits.setup_s, "step": limits.tool_s, "verify": limits.setup_s, "end": limits.setup_s}
    for name, limit_s in allowed_s.items():
        values = [value for each in played for value in each.seconds.get(name, ())]
        if not values:
            continue
        median_s, high_s = (float(number) for number in np.percentile(values, (50, 90)))
        parts.append(f"{_READABLE[name]} {_ms(median_s)} / {_ms(high_s)}")
        if high_s > _SLOW_SHARE * limit_s:
            detail = f"a tenth of all {_READABLE[name]} calls take over {_ms(high_s)} of the {limit_s:g} s allowed"
            findings.append(warning(detail, "lower train.concurrency, raise the environment's limits, or speed it up"))
    rate = sum(len(each.episodes) for each in played) / max(math.fsum(each.wall_s for each in played), 1e-6)
    return together(findings, f"median / 90 %: {', '.join(parts)}; {rate:.1f} episodes/s with {concurrency} at once")


def judge_stay(stay: Stay) -> Finding:
    """What grows from round to round while parts stay open, and what is left when all are closed."""
    num_episodes = stay.episodes_per_round * len(stay.rounds)
    findings = [
        failure(f"{grown} {what} stay behind after {stay.episodes_per_round} episodes", remedy)
        for field, (what, remedy) in _KINDS.items()
        if (grown := _growth(stay.rounds, field)) > 0
    ]
    findings += [
        failure(f"{left} {what} are left when the environment's parts are closed", remedy)
        for field, (what, remedy) in _KINDS.items()
        if field not in _KEPT and (left := getattr(stay.after, field) - getattr(stay.before, field)) > 0
    ]
    if not findings and len(stay.rounds) < _LEAST_ROUNDS:
        return skipped(
            f"nothing was proved: only {len(stay.rounds)} of {_LEAST_ROUNDS} rounds of {stay.episodes_per_round} "
            "episodes ended in time"
        )
    if not findings and not stay.num_scored:
        return skipped(f"nothing was proved: none of {num_episodes} episodes was scored, the first: {stay.failure}")
    if (grown_mb := _growth(stay.rounds, "own_mb")) > _MANY_MB:
        detail = f"memory grows by {grown_mb} MB in {stay.episodes_per_round} episodes"
        findings.append(warning(detail, "look for what keeps episodes alive: caches, lists of the class"))
    strays = [len(census.strays) for census in stay.rounds]
    if (grown := _least_growth(strays)) >= stay.episodes_per_round / 2:
        names = ", ".join(sorted(stay.rounds[-1].strays - stay.rounds[0].strays)[:_SHOWN])
        detail = f"{grown} new entries of common folders after {stay.episodes_per_round} episodes, such as {names}"
        findings.append(warning(detail, "see whether they are the environment's, and remove them in end()"))
    well = (
        f"nothing stays behind after {num_episodes} episodes ({stay.num_scored} scored, the rest cut or failed on "
        f"purpose); {used_mb(stay)} MB while they run"
    )
    return together(findings, well)


def used_mb(stay: Stay) -> int:
    """MiB that the environment takes while it is played."""
    return max(0, max((census.all_mb for census in stay.rounds), default=0) - stay.before.own_mb)


def _growth(rounds: Sequence[Census], field: str) -> int:
    return _least_growth([int(getattr(census, field)) for census in rounds])


def _least_growth(values: Sequence[int]) -> int:
    """The smallest growth of any round after the first: what grows once (a pool, a cache) is no leak."""
    if len(values) < _LEAST_ROUNDS:
        return 0
    return min(later - earlier for earlier, later in pairwise(values))


def _rewards(episodes: Sequence[Episode]) -> list[float]:
    return [episode.reward for episode in episodes if episode.reward is not None]


def _mean(played: Played) -> float:
    rewards = _rewards(played.episodes)
    return math.fsum(rewards) / len(rewards)


def _success(played: Played) -> float:
    scored = [episode for episode in played.episodes if episode.failure is None]
    return sum(episode.is_success for episode in scored) / max(len(scored), 1)


def _summary(played: Played) -> str:
    return f"{_mean(played):.2f} ({_success(played):.0%} solved, {len(played.episodes)} episodes)"


def _failed(episodes: Sequence[Episode]) -> list[str]:
    """Why episodes failed on our side."""
    return [f"{e.failure.kind}: {e.failure.message}" for e in episodes if e.failure is not None]


def _why_unscored(episodes: Sequence[Episode]) -> str:
    return next(iter(_failed(episodes)), f"they ended as {episodes[0].outcome}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"
