"""Which texts are worth it: filters that drop and clean, one document at a time.

filter        what all filters have in common
text          a text as filters look at it: words, signs
repetition    how much a text repeats
gopher        the rules of Gopher
web           the rules of C4 and FineWeb
plain         length, lines, symbols, regular expressions
outside       languages by a model, a function of one's own
redaction     personal data taken out
split         parts for training, validation and tests
contamination documents that hold a piece of an evaluation
chain         filters in a row
sieve         the filters of one task: counts, samples
minhash       which texts are alike
similar       near duplicates in a dataset, deleted
"""

__all__: list[str] = []
