"""The formats of other libraries, written and read by ourselves: none of them needs to be installed.

Each module knows one format in both directions, as functions between Arrow tables and files. Its tests let the other
library read what is written here, and read what the other library wrote.
"""

__all__: list[str] = []
