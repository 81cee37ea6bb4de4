"""Hashing of 64-bit numbers: the one source of chance in the order of samples.

Every choice is `mix64` of a key, and every key is a hash of (seed, purpose, epoch, ...): two purposes never share
a stream, and seed 1 of epoch 2 has nothing in common with seed 2 of epoch 1, as it would with `seed + epoch`.
The function is frozen by golden vectors and by `ORDER_VERSION`; NumPy's generators may change their streams (NEP 19).

Source: S. Vigna's splitmix64, https://prng.di.unimi.it/splitmix64.c (public domain): `mix64(x)` is the first number
it gives when seeded with `x`.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["U64", "Purpose", "derive_key", "mix64", "mix64_inplace", "mix_int"]

U64 = npt.NDArray[np.uint64]

_MASK = 2**64 - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U_GAMMA, _U_FIRST, _U_SECOND = np.uint64(_GAMMA), np.uint64(_FIRST), np.uint64(_SECOND)
_U27, _U30, _U31 = np.uint64(27), np.uint64(30), np.uint64(31)


class Purpose(IntEnum):
    """What a key is for; part of every key, so that no two uses are correlated. The numbers are frozen."""

    LINE = 1
    STAGGER = 2
    WINDOW = 3
    SLICE = 4
    ROW = 5
    SOURCE = 6
    DRAW = 7


def mix64(values: U64) -> U64:
    """Return the hash of each value; a bijection of the 64-bit numbers."""
    mixed = values.copy()
    mix64_inplace(mixed)
    return mixed


def mix64_inplace(values: U64) -> None:
    """Replace each value by its hash; the fastest on arrays that fit into the cache of a core, some 4 ns each."""
    values += _U_GAMMA
    shifted = values >> _U30
    values ^= shifted
    values *= _U_FIRST
    np.right_shift(values, _U27, out=shifted)
    values ^= shifted
    values *= _U_SECOND
    np.right_shift(values, _U31, out=shifted)
    values ^= shifted


def mix_int(value: int) -> int:
    """Return `mix64` of one number."""
    mixed = (value + _GAMMA) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
    return mixed ^ (mixed >> 31)


def derive_key(seed: int, purpose: Purpose, *words: int) -> int:
    """Return the key for `purpose` and `words` (an epoch, a lane, a cursor) below `seed`; order matters.

    To go on by one more word, for many words at once: `mix64(np.uint64(key) ^ words)`.
    """
    key = mix_int(seed & _MASK)
    for word in (int(purpose), *words):
        key = mix_int(key ^ (word & _MASK))
    return key
