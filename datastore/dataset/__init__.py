"""Versions of a dataset: segments of shards, commits, tags; opening, writing and verifying them."""

__all__: list[str] = []
