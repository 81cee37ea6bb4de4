"""Checks that third parties can run against what they build.

storage     a backend that passes here can hold a dataset and a run
read_only   the same for a place that is only read
resume      whatever is resumed goes on where it was, from every step
examples    small datasets and runs
web         a folder behind a web server, over a slow link
"""

__all__: list[str] = []
