"""Where the tasks of an ingest run.

processes     in this process, or in several beside it
engine        on anything that can call a function elsewhere
ray           on a Ray cluster
"""

__all__: list[str] = []
