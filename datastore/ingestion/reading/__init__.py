"""From files to documents.

sources     what a source is, and its files
spool       sources that are no files, as files
listing     a local folder, and what names say
gathered    lists of files, members of archives, what git ignores
content     what a file is, told by its first bytes
folders     folders that another library wrote
choice      what of the sources is taken
streams     bytes in chunks, cut at separators
cutting     a file cut into its records
warc        pages and rows of WARC archives
rows        rows with all their columns, of tables and JSON
texts       the text of several fields
rejects     the reasons why not
documents   records into documents
chats       records of messages into documents
stored      the documents of a dataset of ours, as texts
"""

__all__: list[str] = []
