"""From files to documents.

sources     what a source is, and its files
listing     a local folder, and what names say
streams     bytes, decompressed, cut into records
rows        rows with all their columns, of tables and JSON lines
rejects     the reasons why not
documents   records into documents
chats       records of messages into documents
"""

__all__: list[str] = []
