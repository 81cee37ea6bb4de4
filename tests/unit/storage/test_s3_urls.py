"""An S3 URL is a bucket and a path: whatever else it holds would become a part of the name, or be a secret."""

import pytest

from datastore.errors import ConfigError
from datastore.storage.resolve import open_storage


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIASECRET:hush-hush@bucket/set",
        "s3://AKIASECRET@bucket/set",
        "s3a://bucket/set?X-Amz-Signature=hush-hush",
        "gs://bucket/set#hush-hush",
    ],
)
def test_more_than_a_bucket_and_a_path_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="more than a bucket and a path") as caught:
        open_storage(url)
    assert "hush-hush" not in str(caught.value)
    assert "AKIASECRET" not in str(caught.value)


def test_the_url_of_a_bucket_may_end_in_a_slash() -> None:
    pytest.importorskip("s3fs")
    assert open_storage("s3://bucket/set/").url == "s3://bucket/set"
