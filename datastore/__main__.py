"""The process `datastore`, also as `python -m datastore`. Ctrl-C while its modules load ends it without a traceback."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # `main` puts Python's own way back.

from datastore.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
