"""What may change when a run goes on, and what may not.

Invariant: every key of a run falls under exactly one rule. `fixed`: the run would be another one; it is refused.
`declared`: it changes what is learned from here on; it is refused unless its owner names it. `free`: it is taken over
and told in one line, with the old value, in the ledger too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from palaestra.config import nearest
from palaestra.errors import ConfigError, LedgerError

Rule = Literal["fixed", "declared", "free"]

ENV_REMOVED, SUITE_CHANGED = "env_removed", "suite_changed"

_RULES: Mapping[str, Rule] = {
    "model": "fixed",  # known by its content: its folder may move
    "seed": "fixed",  # tasks and sampling are functions of it
    "train.seed": "fixed",
    "train.family": "fixed",  # prompts would be worded otherwise
    "train.learner.seed": "fixed",
    "suite": "declared",  # groups in hand keep their tasks; later ones are drawn from the new suite
}
_ORDERED = ("suite.weights",)
"""Tables whose order counts: which task a number stands for depends on it."""


def rule_of(key: str) -> Rule:
    """The rule for a dotted key of a run; whatever is not named is free, such as devices, threads and concurrency."""
    return _RULES.get(key, "free")


def check_allowed(names: Collection[str]) -> None:
    """Raise `ConfigError` for a name under `allow` that allows nothing."""
    declared = [key for key, rule in _RULES.items() if rule == "declared"]
    for name in sorted(names):
        if name not in declared:
            raise ConfigError(f"allow names {name!r}, which no rule asks for{nearest(name, declared)}")


def as_recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from a ledger, with lists for tuples; raises `ConfigError` for what cannot be kept."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a run keeps its suite as JSON, which an option of yours is not: {error}") from error
    return plain


def compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, allow: Collection[str]) -> list[str]:
    """A line for each change that is taken over; raises `LedgerError` at the first that is not allowed."""
    lines = []
    for key, old, new in _changes(recorded, as_recorded(wanted), ""):
        top = key.partition(".")[0]
        rule = rule_of(key) if key in _RULES or top not in _RULES else rule_of(top)
        if rule == "fixed":
            raise LedgerError(
                f"this run was started with {key} = {old!r}, not {new!r}, and cannot go on otherwise: use another run "
                "folder, or the settings it was started with"
            )
        if rule == "declared" and top not in allow:
            raise LedgerError(
                f"this run was started with {key} = {old!r}, not {new!r}: to go on with the change, allow it by name "
                f"(--allow {top}); else use another run folder"
            )
        lines.append(f"{key} changed from {old!r} to {new!r}")
    return lines


def _changes(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            dotted = f"{prefix}.{key}" if prefix else str(key)
            yield from _changes(old.get(key), new.get(key), dotted)
        if prefix in _ORDERED and old == new and list(old) != list(new):
            yield f"{prefix} in this order", list(old), list(new)
    elif _are_tables(old, new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _changes(one, other, f"{prefix}[{number}]")
    elif old != new:
        yield prefix, old, new


def _are_tables(old: Any, new: Any) -> bool:
    """Whether these are lists of as many tables, such as the terms of a reward."""
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        return False
    return all(isinstance(each, Mapping) for each in (*old, *new))


def reason_to_drop(env_id: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a group in hand of that environment may not be played on when one suite follows another, each as described.

    Its remaining episodes would be played or scored by other rules than those that ended, in one baseline.
    """
    if env_id not in now["weights"]:
        return ENV_REMOVED
    return SUITE_CHANGED if _rules_of(env_id, before) != _rules_of(env_id, now) else None


def _rules_of(env_id: str, suite: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an episode of an environment depends on: wording, options, reward."""
    rewards = suite.get("rewards", {})
    return suite.get("form"), suite.get("options", {}).get(env_id, {}), rewards.get(env_id, rewards.get(""))
