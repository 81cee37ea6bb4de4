"""A session: one start of a run.

request       what a session is to do
session       one rank's part in a run, from joining to leaving
trackers      where numbers go besides the run folder
imagination   a model, its objective and hooks without numbers
rehearsal     what a run would need, before anything of it is there
"""

__all__: list[str] = []
