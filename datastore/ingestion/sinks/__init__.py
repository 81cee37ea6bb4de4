"""Documents and rows on their way into shards.

documents     texts as tokens or as they are, and what another tool has written
chats         chats with a loss mask, and pairs
duplicates    documents that are there twice
"""

__all__: list[str] = []
