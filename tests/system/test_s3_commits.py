"""Many processes commit to one dataset on a real S3 server: none is lost, none is there twice."""

import subprocess
import sys
from itertools import chain

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.identity import read_info
from datastore.dataset.shards.files import shard_uid
from datastore.dataset.snapshot import open_dataset
from datastore.storage.base import probe_exclusive
from datastore.storage.resolve import open_storage

pytestmark = pytest.mark.s3

WRITERS = 8
WRITER = """
import sys
from datastore.storage.resolve import open_storage  # noqa: E402
from datastore.dataset.shards.files import shard_uid
from datastore.dataset.operations.append import commit_shards  # noqa: E402
from datastore.testing.examples import make_shard

url, name, commits = sys.argv[1], sys.argv[2], int(sys.argv[3])
storage = open_storage(url)
for index in range(commits):
    commit = commit_shards(storage, [make_shard(storage, shard_uid(name, index), lengths=[3, 4])], ingest_id=f"{name}/{index}")
    print(commit.version, flush=True)
"""


@pytest.mark.parametrize(
    "commits", [25, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(2700)])], ids="{}-each".format
)
def test_eight_writers_lose_no_commit_and_make_none_twice(s3_url: str, commits: int) -> None:
    command = [sys.executable, "-c", WRITER, s3_url]
    running = [
        subprocess.Popen([*command, str(writer), str(commits)], stdout=subprocess.PIPE, text=True)
        for writer in range(WRITERS)
    ]
    versions = [[int(line) for line in writer.communicate()[0].split()] for writer in running]
    assert [writer.returncode for writer in running] == [0] * WRITERS
    assert sorted(chain(*versions)) == list(range(1, WRITERS * commits + 1))

    dataset = open_dataset(s3_url)
    expected = {(writer, index) for writer in range(WRITERS) for index in range(commits)}
    uids = [shard.uid for shard in dataset.segments]
    assert len(uids) == len(expected)
    assert set(uids) == {shard_uid(str(writer), index) for writer, index in expected}
    ids = [commit.ingest_id for commit in CommitLog(dataset.storage).history(dataset.commit)]
    assert sorted(ids) == sorted(f"{writer}/{index}" for writer, index in expected)
    assert verify(dataset).ok


def test_the_probe_finds_put_if_absent_and_the_dataset_records_it(s3_url: str) -> None:
    storage = open_storage(s3_url)
    assert probe_exclusive(storage)
    subprocess.run([sys.executable, "-c", WRITER, s3_url, "one", "1"], check=True, capture_output=True)
    assert read_info(storage).exclusive
