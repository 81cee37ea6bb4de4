"""The floor."""

__all__: list[str] = []
