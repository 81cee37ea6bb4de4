"""Copies, clones and vacuum on a real object store."""

import time

import pytest
import s3fs

from datastore.dataset.diff import diff
from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.clone import clone
from datastore.dataset.operations.copy import copy
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.vacuum import vacuum
from datastore.dataset.snapshot import open_dataset
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset, make_shard

pytestmark = pytest.mark.s3


def everything(storage: Storage, folder: str) -> dict[str, bytes]:
    return {stat.key: storage.get(stat.key) for stat in storage.list(folder)}


def test_there_and_back_every_byte_is_the_same(s3_url: str) -> None:
    source, back = MemoryStorage(s3_url.rpartition("/")[2]), MemoryStorage(f"{s3_url.rpartition('/')[2]}-back")
    made = make_dataset(source, [[3, 4], [5]])
    delete(source, ids=made.documents(0)["id"].to_pylist()[:1])
    copy(source, s3_url, all_versions=True)
    make_dataset(source, [[6]], name="later")
    assert copy(source, s3_url, all_versions=True).files == 2
    assert verify(open_dataset(s3_url)).ok
    copy(s3_url, back, all_versions=True)
    assert everything(back, "_log") == everything(source, "_log")
    assert everything(back, "shards") == everything(source, "shards")
    clone(s3_url, f"{s3_url}-light", shallow=True)
    light = open_dataset(f"{s3_url}-light")
    assert verify(light).ok
    assert diff(light, source).added.documents == 0


def test_vacuum_removes_what_has_expired_and_uploads_without_an_end(s3_url: str) -> None:
    storage = open_storage(s3_url)
    make_dataset(storage, [[3, 4], [5]])
    commit_shards(storage, [make_shard(storage, "0" * 32, lengths=[2])], operation="overwrite")
    expire(storage, keep_last=1)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    files = s3fs.S3FileSystem()
    upload = {"Bucket": bucket, "Key": f"{prefix}/shards/00/killed.arrow"}
    begun = files.call_s3("create_multipart_upload", **upload)
    files.call_s3("upload_part", **upload, UploadId=begun["UploadId"], PartNumber=1, Body=b"part of it")
    other = files.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}-other/shards/00/a.arrow")
    assert vacuum(s3_url, dry_run=False).removed == {}
    # Times are whole seconds there, and ours may be a little behind.
    report = vacuum(s3_url, older_than_s=0)
    while report.young.files or "unfinished_writes" not in report.removed:
        report = vacuum(s3_url, older_than_s=0)
    time.sleep(1.1)  # What removes asks the storage for the time, and gets whole seconds, too.
    removed = vacuum(s3_url, dry_run=False, older_than_s=0).removed
    assert {kind: amount.files for kind, amount in removed.items()} == {
        "shards": 2,
        "documents": 2,
        "segments": 1,
        "unfinished_writes": 1,
    }
    assert removed["unfinished_writes"].bytes == 10
    assert vacuum(s3_url, older_than_s=0).removed == {}
    assert verify(open_dataset(s3_url)).ok
    files.call_s3(
        "abort_multipart_upload", Bucket=bucket, Key=f"{prefix}-other/shards/00/a.arrow", UploadId=other["UploadId"]
    )
