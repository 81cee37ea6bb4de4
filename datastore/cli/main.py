"""`datastore`: the group of all commands, and the entry point of the process."""

import logging
import signal
import sys
from typing import NoReturn

import click

from datastore.cli.begin import COMMANDS as FIRST_COMMANDS
from datastore.cli.checkpoints import checkpoint
from datastore.cli.datasets import COMMANDS as DATA_COMMANDS
from datastore.cli.datasets import RECORD_COMMANDS
from datastore.cli.deletion import COMMANDS as DELETION_COMMANDS
from datastore.cli.derived import COMMANDS as DERIVED_COMMANDS
from datastore.cli.ingest import COMMANDS as INGEST_COMMANDS
from datastore.cli.interop import COMMANDS as INTEROP_COMMANDS
from datastore.cli.loading import cache, plan
from datastore.cli.redundancy import COMMANDS as REDUNDANCY_COMMANDS
from datastore.cli.results import COMMANDS as RESULT_COMMANDS
from datastore.cli.runs import COMMANDS as RUN_COMMANDS
from datastore.cli.shell import CliSession, CommandGroup, call, debug_option, example, last_words
from datastore.cli.versions import COMMANDS as VERSION_COMMANDS
from datastore.host import quieten

__all__ = ["cli", "main"]


@click.group(
    cls=CommandGroup,
    params=[debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog=example("datastore doctor"),
)
@click.version_option(package_name="llm-datastore", message="datastore %(version)s")
def cli() -> None:
    """Text in, batches out, checkpoints kept: the storage layer under language-model training.

    A dataset is a URL (a path, file://, memory://, s3:// ...); URL@7 is its version 7, URL@name a tagged one.
    """


for command in (
    *INGEST_COMMANDS,
    *DERIVED_COMMANDS,
    *DATA_COMMANDS,
    *VERSION_COMMANDS,
    *DELETION_COMMANDS,
    *INTEROP_COMMANDS,
    *RECORD_COMMANDS,
    *REDUNDANCY_COMMANDS,
    *RUN_COMMANDS,
    *RESULT_COMMANDS,
    checkpoint,
    cache,
    plan,
    *FIRST_COMMANDS,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    session = CliSession()
    sys.excepthook = last_words(session)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quieten()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = call(cli, None, session)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Everything is done and said; only the interpreter has to end.
    if "datastore.training.parallel.ranks" in sys.modules:
        from datastore.training.launcher import leave
        from datastore.training.parallel.ranks import was_connected

        if was_connected():  # This process was a rank that torchrun started.
            leave(status)
    sys.exit(status)
