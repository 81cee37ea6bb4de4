"""Objectives: from a batch to a loss.

base         Objective, and the rows it learns from
language     the next token, the answers of a chat, what is hidden
preference   which of two answers is better
records      classes of texts, items, clicks
captions     what a picture shows
catalog      an objective by its name in the settings
"""

__all__: list[str] = []
