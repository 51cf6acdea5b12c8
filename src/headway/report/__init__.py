"""The report: a swap's census and certificate as a terminal table, as JSON, and as one self-contained HTML page."""

from headway.report.page import page
from headway.report.pictures import Picture, pictures
from headway.report.report import Report
from headway.report.terminal import show, show_census
from headway.report.times import Pass, Times, measure

__all__ = ["Pass", "Picture", "Report", "Times", "measure", "page", "pictures", "show", "show_census"]
