"""Blocks of shards, checked before they are handed out: mapped where the file is local, kept in memory where not."""
