"""From files to documents.

sources     what a source is, and its files
listing     a local folder, and what names say
streams     bytes, decompressed, cut into records
documents   records into documents, or the reason why not
"""

__all__: list[str] = []
