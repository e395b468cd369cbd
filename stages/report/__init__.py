"""The report of a run: report.html, and its first table as Markdown.

record.py reads a run folder, charts.py draws, page.py writes HTML; curves.py, results.py and report.py are the sections.
"""

from stages.report.report import write_report
from stages.report.results import first_table

__all__ = ["first_table", "write_report"]
