"""A dataset as other libraries see it.

readable   what they need of it, as a protocol
views      the methods of Dataset that speak Arrow, pandas, Polars
scan       pyarrow.dataset
sql        DuckDB
hf         Hugging Face datasets
"""

__all__: list[str] = []
