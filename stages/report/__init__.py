"""The report of a run: report.html, and its first table as Markdown.

record.py reads a run folder, charts.py draws, page.py and style.py are the page; report.py lists the sections, each of which has its file.
"""

from stages.report.report import write_report
from stages.report.results import first_table

__all__ = ["first_table", "write_report"]
