"""The parts of a version: shards, the segments that list them, deletions, parity groups.

info              ShardInfo: one shard as the manifest describes it
segment_file      the file of a segment: encode, decode, check
segments          Segments: all shards as columns; load them
segment_changes   the segments of a next version: appended to, replaced in, stored
files             the files of shards and tokenizers, read and written whole
batches           record shards, batch by batch
deletions         which rows are deleted
parity_groups     the tables of parity groups
inventory         every file that a shard, a group or a version names: one list
"""

__all__: list[str] = []
