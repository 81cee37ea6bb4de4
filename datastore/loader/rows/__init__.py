"""Rows of any schema as batches, in the same order, on the same ranks and with the same state as tokens.

loader     RowLoader: an iterator of batches
assemble   a planned batch made: read, transformed, collated
workers    threads or processes that make them
store      the batches of shards that rows are read from, kept under a budget
gather     rows taken out of many batches, column by column
mapped     batches whose texts stay in a file of this machine
stream     from a dataset to the order of its rows
grid       which rows there are, and in which shards they lie
sampling   other ways to go through them: by weight, by stratum
weighted   rows drawn by weight, with replacement and without
strata     an order in which each value of a column comes at its rate
joint      the rows of several sources under one numbering
source     what a loader reads rows from, as a protocol
files      Parquet files and saved Hugging Face datasets as a source
batch      one batch
"""

__all__: list[str] = []
