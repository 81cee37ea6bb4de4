"""The formats of other libraries, written and read by ourselves: none of them needs to be installed.

    formats      those that can be read, by name
    base         what a format is; an export appears whole or not at all
    export       a dataset into a format
    columnar     Parquet, Arrow, datasets
    delimited    CSV and TSV
    plainly      compressed files as plain bytes
    cells        values as cells of text
    packed       lists of bytes, packed
    litdata, mds, megatron, webdataset    one module each

Each module knows one format in both directions, as functions between Arrow tables and files. Its tests let the other
library read what is written here, and read what the other library wrote.
"""

__all__: list[str] = []
