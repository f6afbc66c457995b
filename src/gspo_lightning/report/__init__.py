"""Reports of a finished run: a summary, a table on the screen, and a page to read."""

from gspo_lightning.report.page import render_report
from gspo_lightning.report.summary import print_evaluation, print_result_table, write_summary

__all__ = ["print_evaluation", "print_result_table", "render_report", "write_summary"]
