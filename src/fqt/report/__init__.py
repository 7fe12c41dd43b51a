"""Reports: from records to tables, figures and one web page.

Reads records and nothing else; only the paper's room and the CLI import it.
"""

from fqt.report.catalog import catalog_figure, catalog_markdown, catalog_table
from fqt.report.certificate import certificate_table
from fqt.report.collect import collect
from fqt.report.diagnosis import diagnosis_tables, plan_table
from fqt.report.figures import comparison_figure, has_costs, noise_figure
from fqt.report.page import render, write_page
from fqt.report.plot import save_figure
from fqt.report.summary import MeanStd, Row, read_comparison, summarize
from fqt.report.tables import markdown, rich_table, terminal_table

__all__ = [
    "MeanStd",
    "Row",
    "catalog_figure",
    "catalog_markdown",
    "catalog_table",
    "certificate_table",
    "collect",
    "comparison_figure",
    "diagnosis_tables",
    "has_costs",
    "markdown",
    "noise_figure",
    "plan_table",
    "read_comparison",
    "render",
    "rich_table",
    "save_figure",
    "summarize",
    "terminal_table",
    "write_page",
]
