"""The command line: parse, call one function, print. The only place that reads the environment."""

__all__: list[str] = []
