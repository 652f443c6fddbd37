"""The check of the settings: every rule, applied."""

from __future__ import annotations

from palaestra.trainer.doctor import _rules_of_engine, _rules_of_learner, _rules_of_rollouts
from palaestra.trainer.doctor._check import Finding, together, warning
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._rules import RULES, Hint
from palaestra.trainer.doctor._subject import Subject

RULE_MODULES = (_rules_of_learner, _rules_of_engine, _rules_of_rollouts)
"""What registers rules."""


def find_hints(subject: Subject, machine: Machine) -> dict[str, Hint]:
    """What the rules say, by the rule's name."""
    found = {each.__name__: each(subject, machine) for each in RULES}
    return {name: hint for name, hint in found.items() if hint is not None}


def check_settings(subject: Subject, machine: Machine) -> Finding:
    """Settings that do nothing or defeat themselves, each a warning."""
    findings = [warning(hint.detail, hint.remedy) for hint in find_hints(subject, machine).values()]
    return together(findings, f"none of {len(RULES)} rules about inert or self-defeating settings applies")
