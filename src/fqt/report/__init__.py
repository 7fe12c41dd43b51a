"""Reports: from records to tables and figures. Reads records and nothing else; nothing but the CLI imports it."""

from fqt.report.certificate import certificate_table
from fqt.report.diagnosis import diagnosis_tables, plan_table
from fqt.report.figures import comparison_figure, save_figure
from fqt.report.summary import Row, Spread, read_comparison, summarize
from fqt.report.tables import markdown, terminal_table

__all__ = [
    "Row",
    "Spread",
    "certificate_table",
    "comparison_figure",
    "diagnosis_tables",
    "markdown",
    "plan_table",
    "read_comparison",
    "save_figure",
    "summarize",
    "terminal_table",
]
