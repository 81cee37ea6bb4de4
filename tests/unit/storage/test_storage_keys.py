"""Which keys are refused: the rule written twice, once for speed and once to be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import ConfigError
from datastore.storage.base import check_key

PARTS = st.sampled_from(["", ".", "..", "...", "a", "shards", ".tmp", ".a.tmp", "a.tmp", ".tmpx", ".x", "a b", "é"])
ODD = st.text(st.sampled_from("a./\\\n\0\ud800\x7f "), max_size=6)


def is_plain(key: str) -> bool:
    """The rule of `check_key`, part by part."""
    parts = key.split("/")
    if any(part in {"", ".", ".."} or (part.startswith(".") and part.endswith(".tmp")) for part in parts):
        return False
    return not any(c == "\\" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in key)


@given(st.lists(PARTS, max_size=4).map("/".join) | ODD | st.text(max_size=20))
def test_a_key_is_refused_exactly_if_a_part_or_a_character_of_it_is(key: str) -> None:
    if is_plain(key):
        assert check_key(key) == key
    else:
        with pytest.raises(ConfigError, match="not a valid key"):
            check_key(key)
