"""The report of a run: one self-contained HTML page made from what the run folder holds."""

from posttrain.report.page import build

__all__ = ["build"]
