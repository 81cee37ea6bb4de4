"""The log of a dataset: versions, their documents, names for them.

keys       where everything lies: the tree of docs/format.md as code
manifest   the documents: a commit and what it names
commits    CommitLog: how a version is read, and how it is committed
lease      one writer at a time where put-if-absent does not hold, and patience
identity   datastore.json for programs, README.md for people
tags       names for versions
"""

__all__: list[str] = []
