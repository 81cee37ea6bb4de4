"""`datastore ui`: datasets and runs in a browser, on this machine, read-only.

server      the address, its token, and the process
app         which page answers which address, and who may ask
dataset_pages, run_pages    from an address to a template and what it shows
places      which datasets and runs there are
datasets    versions, lengths, sources, shards and plans
documents   documents: listed, searched, one of them shown
runs        how runs stand, their checkpoints, what they do not share
series      the numbers of runs: kept as columns, thinned for a picture
templates   the pages, as Jinja has them
static      what the browser gets: style.css, and app.js, which draws with uPlot; nothing comes from elsewhere
"""

__all__: list[str] = []
