"""What `kvswitch demo` leaves behind: a table, summary.json and one HTML page."""

from kvswitch_demo.report.compare import HEADLINES, Identity, compare_tokens
from kvswitch_demo.report.output import print_table, summary, write_html, write_summary
from kvswitch_demo.report.provenance import Provenance
from kvswitch_demo.report.table import HEADLINE_LABELS
from kvswitch_demo.report.transcripts import transcripts

__all__ = [
    "HEADLINES",
    "HEADLINE_LABELS",
    "Identity",
    "Provenance",
    "compare_tokens",
    "print_table",
    "summary",
    "transcripts",
    "write_html",
    "write_summary",
]
