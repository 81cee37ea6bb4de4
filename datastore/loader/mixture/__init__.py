"""Several datasets as one stream of samples, each by its weight.

request    Mixture: which datasets, with which weights, from when on and how often
schedule   which of them each position draws from: a pure function
order      the order of the mixture, from those of its datasets
joint      their shards and samples under one numbering
"""

__all__: list[str] = []
