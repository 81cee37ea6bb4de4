"""`datastore ui`: datasets and runs in a browser, on this machine, read-only.

server      the address, its token, and the process
app         which page answers which address, and who may ask
places      which datasets and runs there are
datasets    what the pages of a dataset say
documents   documents: listed, searched, one of them shown
runs        what the pages of runs say
series      the numbers of runs: kept as columns, thinned for a picture

Pages are made here, as HTML; the browser draws the plots (static/app.js, with uPlot) and needs nothing from elsewhere.
"""

__all__: list[str] = []
