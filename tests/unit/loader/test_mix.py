"""The hash is frozen: these numbers come from the published splitmix64, not from this package."""

import numpy as np

from datastore.loader.order.mix import Purpose, derive_key, mix64, mix_int

GAMMA = 0x9E3779B97F4A7C15
SPLITMIX64_FROM_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_mix64_gives_the_published_numbers_of_splitmix64() -> None:
    states = [(1234567 + GAMMA * step) % 2**64 for step in range(5)]
    assert [mix_int(state) for state in states] == SPLITMIX64_FROM_1234567
    assert mix64(np.array(states, np.uint64)).tolist() == SPLITMIX64_FROM_1234567
    assert mix_int(0) == 0xE220A8397B1DCDAF


def test_the_array_and_the_number_version_agree_at_the_ends_of_the_range() -> None:
    values = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    assert mix64(np.array(values, np.uint64)).tolist() == [mix_int(value) for value in values]


def test_keys_are_frozen() -> None:
    assert derive_key(7, Purpose.LINE, 3) == 15068375702381615036


def test_neither_seed_nor_epoch_nor_purpose_stand_for_each_other() -> None:
    keys = {derive_key(seed, purpose, epoch) for seed in range(20) for purpose in Purpose for epoch in range(20)}
    assert len(keys) == 20 * len(Purpose) * 20
