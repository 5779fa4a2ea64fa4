"""Reports: self-contained HTML pages with tables as CSV and JSON."""

from rlhf.reports.comparison_page import write_comparison_report
from rlhf.reports.run_page import write_report

__all__ = ["write_comparison_report", "write_report"]
