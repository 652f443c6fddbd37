"""The report of a run: one HTML page that stands alone, and its plots as PNG files."""

from palaestra.trainer.report._page import Stage, write_report
from palaestra.trainer.report._plots import draw_plots

__all__ = ["Stage", "draw_plots", "write_report"]
