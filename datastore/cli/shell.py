"""How a command ends: an exit code, and at most one line on stderr.

    0    done
    1    failed; the line says what to do
    2    wrong use: an option, an argument or a setting
    3    more input was rejected than the limit allows, nothing was committed
    130  interrupted
    141  whoever read our output closed it

An error is `error[code]: fact (values). What to do. See: datastore explain code`. A traceback is shown with `--debug` only, also for a bug:
`sys.excepthook` keeps that promise, so that no `except` here has to be blind.
"""

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from click.shell_completion import CompletionItem
from typing_extensions import override

from datastore.errors import ConfigError, DatastoreError, RejectedError

__all__ = [
    "BROKEN_PIPE",
    "CliSession",
    "CommandGroup",
    "call",
    "debug_option",
    "example",
    "given_options",
    "last_words",
    "silence_stdout",
]

BROKEN_PIPE = 141
"""What a shell reports for a process that SIGPIPE ended."""

_INTERRUPTED = 130


@dataclass(slots=True)
class CliSession:
    """What one call of the command line has been told so far; `ctx.obj` of every command."""

    debug: bool = False
    command: click.Command | None = None
    """The one that runs."""

    progress: str = ""
    """How to show progress; empty: as suits stderr."""


class CommandGroup(click.Group):
    """A group whose commands all take `--debug`, wherever on the line it stands, and are listed in the order of work."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's protocol
        """Return the names of the commands in the order in which they were added."""
        return list(self.commands)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register `cmd`, give it the `--debug` option, and let the shell complete paths where it takes a text."""
        cmd.params.append(debug_option())
        for parameter in cmd.params:
            if parameter.type is click.STRING:
                parameter.type = _PLACE
        super().add_command(cmd, name)


class _Place(click.types.StringParamType):
    """A text that may be a path: most are, or URLs."""

    @override
    def shell_complete(
        self,
        ctx: click.Context,
        param: click.Parameter,
        incomplete: str,
    ) -> list[CompletionItem]:
        """Let the shell complete a path."""
        return [CompletionItem(incomplete, type="file")]


_PLACE = _Place()


def debug_option() -> click.Option:
    """Return the `--debug` option, which sets `Session.debug`; and as each command has it, it notes which one runs."""

    def remember(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's call
        session = context.ensure_object(CliSession)
        session.command = context.command
        session.debug |= value

    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=remember, help="Show tracebacks."
    )


def example(*lines: str) -> str:
    """Return the end of a command's help: lines that a user can paste."""
    return "\b\n" + "\n".join(("Example:", *(f"  {line}" for line in lines)))


def given_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options that were given, by setting, and how each was written, for errors: `--on-error skip`."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    flags = _flags(click.get_current_context().command)
    return given, {name: f"{flags[name]} {value}" for name, value in given.items()}


def _flags(command: click.Command) -> dict[str, str]:
    """Return the flag for each name by which Python knows an option of `command`."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    spelled = {option.opts[0].removeprefix("--").replace("-", "_"): option.opts[0] for option in options}
    return spelled | {option.name: option.opts[0] for option in options if option.name}


def _in_flags(hint: str, command: click.Command) -> str:
    """Return `hint` with the options of `command` where it names arguments or settings.

    Hints are written for Python and stand in backticks: `allow_missing` is `--allow-missing` here, `workers=1` is
    `--workers 1`, and what only `--set` can set is `--set take=rows`. Settings of a hook or a source are named without backticks.
    """
    flags = _flags(command)
    is_flag = {option.opts[0]: option.is_flag for option in command.params if isinstance(option, click.Option)}
    settings = _settings(command.name or "") if "overrides" in flags else []
    tables = {key.rpartition(".")[0] for key in settings}

    def spelled(found: re.Match[str]) -> str:
        name, value = found[1], found[2] or ""
        if name in flags:
            return f"{flags[name]} {value}" if value and not is_flag[flags[name]] else flags[name]
        keys = [key for key in settings if key == name or key.endswith(f".{name}")]
        # Of several settings with such a name nobody knows which is meant, and a whole table is not set like this.
        return f"--set {keys[0]}={value or 'VALUE'}" if len(keys) == 1 and keys[0] not in tables else found[0]

    told = _NAMED.sub(spelled, hint)
    if any(re.search(rf"(?<!--set )\b{re.escape(key)}\b", told) for key in settings if "." in key):
        told += " Settings are given as --set KEY=VALUE, too."
    return told


_NAMED = re.compile(r"`([a-z_.]+)(?:=([^`]*))?`")


def _settings(command: str) -> list[str]:
    """Return the names of what `--set` can set."""
    from datastore.document import setting_names

    if command in {"train", "resume", "fork"}:
        from datastore.training.settings import Settings

        return setting_names(Settings)
    from datastore.ingestion.settings import IngestSettings

    return setting_names(IngestSettings)


def call(command: click.Command, arguments: Sequence[str] | None, session: CliSession) -> int:
    """Run `command` on `arguments` (None: those of the process), print what went wrong, and return the exit code."""
    try:
        status = command.main(args=arguments, prog_name="datastore", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted: what was finished is kept; the same command goes on from there.\n")
        return _INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return BROKEN_PIPE
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        sys.stderr.write(f"{help_wanted.format_message()}\n")
        return _status(help_wanted)
    except (click.ClickException, DatastoreError, MemoryError, ModuleNotFoundError, OSError) as error:
        if session.debug:
            traceback.print_exception(error)
        code, text = _explain(error, session.command)
        # Wrong use has been told which help to read.
        more = "" if code == "usage" else f" See: datastore explain {code}"
        sys.stderr.write(f"error[{code}]: {' '.join(text.split())}{more}\n")
        return _status(error)
    return status if isinstance(status, int) else 0


def silence_stdout() -> None:
    """Point stdout at nothing, so that flushing it when the interpreter ends cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception, command: click.Command | None) -> tuple[str, str]:
    """Return the code and the one line for an error that is not a bug."""
    if isinstance(error, DatastoreError):
        if command is not None:
            error.hint = _in_flags(error.hint, command)
        return error.code, str(error)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "datastore"
        fact = error.format_message()
        return "usage", f"{fact if fact.endswith(('.', '?')) else f'{fact}.'} See `{where} --help`."
    if isinstance(error, click.ClickException):
        return "usage", error.format_message()
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return "dependency", f"a Python package is missing (name={package!r}). Install the extra that brings it."
    if isinstance(error, MemoryError):
        return "memory", "the machine has no memory left for this. Use fewer processes, or smaller batches and tasks."
    return "system", f"{error}."


def _status(error: Exception) -> int:
    if isinstance(error, RejectedError):
        return 3
    return 2 if isinstance(error, ConfigError | click.UsageError) else 1


def last_words(session: CliSession) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """Return the `sys.excepthook` that reports a bug in one line, and its traceback if `session.debug`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if session.debug:
            sys.__excepthook__(kind, error, trace)
        text = " ".join(f"{kind.__name__}: {error}".split()).removesuffix(".")
        foreign = _foreign_line(trace)
        whose = (
            f"It came from {foreign}, which is no part of datastore; add --debug to see the way there."
            if foreign
            else "This is a bug in datastore; add --debug to see where, and report it."
        )
        sys.stderr.write(f"error[bug]: {text}. {whose}\n")

    return hook


def _foreign_line(trace: TracebackType | None) -> str:
    """Return file and line of the user's own code, such as a hook, if the error rose from there; else nothing."""
    ours = str(Path(__file__).parents[1])
    libraries = tuple({sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "<"})
    own = [
        one
        for one in traceback.extract_tb(trace)
        if one.filename.startswith(ours) or not one.filename.startswith(libraries)
    ]
    return f"{own[-1].filename}:{own[-1].lineno}" if own and not own[-1].filename.startswith(ours) else ""
