"""The result of a check: a verdict, what was measured, and what to do where it is not well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a check ended; only a failure fails the examination."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `remedy` is empty where nothing needs to be done."""

    verdict: Verdict
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row: a finding, what was checked, and how long it took."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        values = {"name": self.name, "verdict": self.verdict.value, "detail": self.detail, "remedy": self.remedy}
        return {**values, "seconds": round(self.seconds, 3)}


def ok(detail: str) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, detail)


def warning(detail: str, remedy: str) -> Finding:
    """The run would work, but not as meant."""
    return Finding(Verdict.WARNING, detail, remedy)


def failure(detail: str, remedy: str) -> Finding:
    """The run would fail, or learn nothing."""
    return Finding(Verdict.FAILURE, detail, remedy)


def skipped(reason: str) -> Finding:
    """Nothing was measured."""
    return Finding(Verdict.SKIPPED, reason)


def together(findings: Sequence[Finding], well: str) -> Finding:
    """The worst of the findings, with the others of its kind behind it; `well` where there is none."""
    for verdict in (Verdict.FAILURE, Verdict.WARNING):
        chosen = [finding for finding in findings if finding.verdict is verdict]
        if chosen:
            details = "; ".join(dict.fromkeys(finding.detail for finding in chosen))
            remedies = "; ".join(dict.fromkeys(finding.remedy for finding in chosen if finding.remedy))
            return Finding(verdict, details, remedies)
    return ok(well)
