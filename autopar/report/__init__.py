"""How results are told: terminal tables, figures, Chrome traces, one self-contained HTML page, files.

``DemoReport`` holds what there is to tell; ``render_page`` and ``write_report`` tell it. matplotlib and rich are
imported when something is drawn, so that importing this package costs nothing.
"""

from autopar.report.content import DemoReport
from autopar.report.page import render_page
from autopar.report.write import write_report

__all__ = ["DemoReport", "render_page", "write_report"]
