"""A sweep as one HTML page that needs neither network nor this program."""

REPORT_FILE = "report.html"
