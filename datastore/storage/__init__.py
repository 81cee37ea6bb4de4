"""Bytes by key, on any URL: the only place that knows fsspec."""
