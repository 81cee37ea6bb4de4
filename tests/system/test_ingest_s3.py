"""An ingest on a real S3 server: from a disk into a bucket, from a bucket into another place, with workers."""

from pathlib import Path

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url

pytestmark = pytest.mark.s3


def test_a_bucket_can_be_the_target_and_the_source_and_gives_the_same_text(s3_url: str, tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    bucket = open_storage(join_url(s3_url, "src"))
    for number in range(20):
        data = f"text number {number}\n".encode() * 50
        (source / f"{number:02}.txt").write_bytes(data)
        bucket.put(f"{number:02}.txt", data)
    settings = IngestSettings(workers=2, task_bytes=20_000)
    into = ingest([str(source)], join_url(s3_url, "data"), settings=settings)
    back = ingest([join_url(s3_url, "src")], str(tmp_path / "data"), settings=settings)
    assert (into.documents, back.documents) == (20, 20)
    assert into.tasks > 2
    datasets = [open_dataset(report.url) for report in (into, back)]
    assert datasets[0].to_arrow() == datasets[1].to_arrow()
    assert verify(datasets[0]).ok
    assert ingest([str(source)], join_url(s3_url, "data"), settings=settings).added is False
    one = ingest([join_url(s3_url, "src", "03.txt")], str(tmp_path / "one"), settings=settings)
    assert one.documents == 1
