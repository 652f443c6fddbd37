"""The proposed job, and of a job what somebody chose.

Invariant: what follows from the rest is never written as if it were chosen: it would contradict what is set later.
"""

from __future__ import annotations

from typing import Any

from palaestra.config import override
from palaestra.trainer.job import Job
from palaestra.trainer.sizing._propose import Proposal


def proposed_job(job: Job, proposal: Proposal) -> Job:
    """`job` with all that is proposed."""
    chosen, assignments = chosen_values(job), proposal.assignments
    if "max_lag" not in chosen.get("train", {}):
        assignments.pop("train.max_lag", None)  # the mode brings its own
    return Job.parse(override(chosen, assignments), source="the proposed job")


def chosen_values(job: Job) -> dict[str, Any]:
    """What the job's file and flags set, without defaults; JSON values."""
    values = job.model_dump(mode="json", exclude_unset=True)
    for name in job.train.derived_keys:
        del values["train"][name]
    return values
