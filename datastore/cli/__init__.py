"""The command line: parse, call one function, print. The only place that reads the environment.

main          all commands
shell         errors, exit codes, examples
output        text, tables, JSON, progress
ranks         which rank this process is
ingest, derived, interop, datasets, versions, deletion, redundancy, runs, results, checkpoints, loading, begin    the commands
"""

__all__: list[str] = []
