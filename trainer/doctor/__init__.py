"""What can be known about a training job before it runs, measured: a row for each check, none hides another."""

from palaestra.trainer.doctor._check import Check, Verdict
from palaestra.trainer.doctor._examination import examine
from palaestra.trainer.doctor._subject import Subject

__all__ = ["Check", "Subject", "Verdict", "examine"]
