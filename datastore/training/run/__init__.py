"""The folder of a run.

folder   its documents: settings, sessions
lock     one writer at a time
data     which versions are read, and what is held back
record   what each step consumed
audit    prove and trace
"""

__all__: list[str] = []
