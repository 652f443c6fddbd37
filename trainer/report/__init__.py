"""The report of a run: one HTML page that stands alone, and its plots as PNG files."""

from palaestra.trainer.report._page import Stage, write_report
from palaestra.trainer.report._plots import draw_plots
from palaestra.trainer.report._predicted import ComparedTime, Comparison, compare
from palaestra.trainer.report._run import write_run_report

__all__ = ["ComparedTime", "Comparison", "Stage", "compare", "draw_plots", "write_report", "write_run_report"]
