"""Bytes and tables: what a token shard, a documents file and a record shard look like. No I/O happens here."""

__all__: list[str] = []
