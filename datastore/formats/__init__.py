"""Bytes and tables: what a token shard, a documents file and a record shard look like. No I/O happens here.

arrow         Arrow without pandas: NumPy views, and a writer of files of lists
tokens        a token shard
documents     the documents of a token shard
tokentext     the text of tokens
records       a record shard
schema        the schema of records
huggingface   what `datasets` says of columns
fitting       rows made to fit a schema, or refused
plain         rows of Python values as Arrow
joining       rows put together and taken apart, whatever their types
common        the schema that several files have in common
evolution     rows of an older schema as rows of a newer one
decompression  compressed bytes as plain ones
warc          the records of a WARC archive
http          what a web server answered, without its encodings
safetensors   the header of a safetensors file
"""

__all__: list[str] = []
