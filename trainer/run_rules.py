"""What may change when a run goes on, and what may not.

Invariant: every key of a run falls under exactly one rule. `fixed`: the run would be another one; it is refused.
`declared`: it changes what is learned from here on; it is refused unless its owner names it. `free`: it is taken over
and told in one line, with the old value, in the ledger too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from palaestra.errors import LedgerError

Rule = Literal["fixed", "declared", "free"]

_RULES: Mapping[str, Rule] = {
    "model": "fixed",  # known by its content: its folder may move
    "seed": "fixed",  # tasks and sampling are functions of it
    "train.seed": "fixed",
    "train.family": "fixed",  # prompts would be worded otherwise
    "train.learner.seed": "fixed",
    "suite": "declared",  # groups in hand keep their tasks; later ones are drawn from the new suite
}


def rule_of(key: str) -> Rule:
    """The rule for a dotted key of a run; whatever is not named is free, such as devices, threads and concurrency."""
    return _RULES.get(key, "free")


def compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, allow: Collection[str]) -> list[str]:
    """A line for each change that is taken over; raises `LedgerError` at the first that is not allowed."""
    lines = []
    for key, old, new in _changes(recorded, wanted, ""):
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
    elif old != new:
        yield prefix, old, new
