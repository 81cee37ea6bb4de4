"""Checks that third parties can run against what they build: a storage backend that passes here can hold a dataset."""
