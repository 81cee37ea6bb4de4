"""Rows of files that others wrote, read where they lie: nothing is ingested, nothing is copied.

opening    open_files: from a URL to a source of rows
index      which files there are, and where the batches of each begin
parquet    one Parquet file: its footer, and a row group of it
streams    one Arrow stream, as saved by Hugging Face `datasets`
"""

__all__: list[str] = []
