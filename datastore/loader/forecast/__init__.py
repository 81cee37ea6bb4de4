"""A run of the loader without data: the real planning, and a model of cache, threads and link.

forecast   the request, and the answer for one number of ranks
node       the ranks of one node beside each other, event by event
imagined   a dataset that is not there
"""

__all__: list[str] = []
