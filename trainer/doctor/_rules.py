"""Settings that contradict what they are for: rules over a whole job, each a pure function of job and machine.

What cannot work at all is refused when a configuration is read. A rule is for what is accepted and does nothing, or
defeats itself. Invariant: a job with nothing but a model and environments meets no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._subject import Subject


class Hint(NamedTuple):
    """What is wrong with a setting, and what to do."""

    detail: str
    remedy: str


Rule = Callable[[Subject, Machine], Hint | None]

RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Decorator that adds a rule."""
    RULES.append(function)
    return function


def drop(subject: Subject, key: str) -> str:
    """The remedy of an inert key."""
    return f"leave {subject.prefix}{key} out"
