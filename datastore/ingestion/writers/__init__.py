"""Data from a program of one's own.

records   rows; and what both writers share
tokens    documents that are tokens already
"""

__all__: list[str] = []
