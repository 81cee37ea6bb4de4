"""Where everything lies in a dataset: what the code says is what the format page says."""

import re
from pathlib import Path

import pytest

from datastore.dataset.log import keys

PAGE = Path(__file__).parents[3] / "docs" / "format.md"
DIGEST, SHA256, NAME = "0123456789abcdef" * 2, "0123456789abcdef" * 4, "ab12"

WRITTEN = {
    "datastore.json": keys.INFO_KEY,
    "_log/00000000000000000007.json": keys.commit_key(7),
    "_log/_last": keys.HINT_KEY,
    "_log/_writer": keys.LEASE_KEY,
    "_segments/<digest>.arrow": keys.segment_key(DIGEST),
    "shards/<2 digits>/<name>.arrow": keys.shard_key(NAME),
    "docs/<2 digits>/<name>.parquet": keys.documents_key(NAME),
    "deletions/<digest>.arrow": keys.deletions_key(DIGEST),
    "tokenizers/<sha256>.json": keys.tokenizer_key(SHA256),
    "refs/tags/<name>.json": keys.tag_key(NAME),
    "parity/<2 digits>/<name>.xor": keys.parity_key(NAME),
    "_parity/<digest>.arrow": keys.parity_table_key(DIGEST),
    "_behind/<root id>": keys.behind_key("root7"),
    "purges/<digest>.json": keys.certificate_key(DIGEST),
    "purges/plans/<digest>.json": keys.purge_plan_key(DIGEST),
    "ingests/<id>/": f"{keys.journal_folder(DIGEST)}/",
    "README.md": keys.CARD_KEY,
}
FILLED = {
    "<digest>": DIGEST,
    "<sha256>": SHA256,
    "<2 digits>": NAME[:2],
    "<name>": NAME,
    "<root id>": "root7",
    "<id>": DIGEST,
}


def tree() -> list[str]:
    block = PAGE.read_text(encoding="utf-8").split("```text\n", 1)[1].split("```", 1)[0]
    return [re.split(r"\s{2,}", line)[0] for line in block.splitlines()]


def test_the_page_and_the_code_name_the_same_files() -> None:
    assert tree() == list(WRITTEN)


@pytest.mark.parametrize("pattern", WRITTEN)
def test_a_key_is_what_the_page_says(pattern: str) -> None:
    wanted = pattern
    for blank, value in FILLED.items():
        wanted = wanted.replace(blank, value)
    assert WRITTEN[pattern] == wanted


@pytest.mark.parametrize("version", [1, 7, 10**19])
def test_a_version_is_read_from_its_key(version: int) -> None:
    assert keys.version_of_key(keys.commit_key(version)) == version


@pytest.mark.parametrize(
    "key", ["_log/_last", "_log/7.json", "_log/00000000000000000007.json.bak", "x/_log/00000000000000000007.json"]
)
def test_another_key_has_no_version(key: str) -> None:
    assert keys.version_of_key(key) is None


def test_digests_are_read_from_names() -> None:
    tables = [keys.segment_key(DIGEST), keys.deletions_key(DIGEST), keys.parity_table_key(DIGEST)]
    assert [keys.table_digest_in(key) for key in tables] == [DIGEST] * 3
    assert keys.table_digest_in(keys.shard_key(NAME)) is None
    assert keys.sha256_in(keys.tokenizer_key(SHA256)) == SHA256
    assert keys.sha256_in(keys.segment_key(DIGEST)) is None
