"""The report of a study, made from its directory alone: Markdown, one self-contained HTML page, figures and CSVs."""

from minipersona.report.write import write_report

__all__ = ["write_report"]
