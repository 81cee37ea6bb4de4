"""From a URL to the bytes it names: one place, however it is written, and no secret on the way."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import ConfigError, DependencyError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.backends.s3 import S3Storage
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url, strip_credentials
from datastore.storage.wrappers import Subfolder

ROOTS = st.sampled_from(
    ["s3://bucket", "s3://bucket/books/", "/", "/data/", "data", "file:///data", "memory://x", "memory://x/y/"]
)
PARTS = st.lists(st.from_regex(r"[a-z0-9_.-]*[a-z0-9_-]", fullmatch=True), min_size=1, max_size=3)
WORDS = st.from_regex(r"[A-Za-z0-9+]{6,20}", fullmatch=True)


@given(ROOTS, PARTS, PARTS)
def test_joining_in_one_step_or_in_two_is_the_same(root: str, first: list[str], then: list[str]) -> None:
    assert (
        join_url(root, *first, *then)
        == join_url(join_url(root, *first), *then)
        == join_url(root, "/".join(first + then))
    )


@given(ROOTS, PARTS)
def test_a_joined_url_is_below_the_first(root: str, parts: list[str]) -> None:
    assert join_url(root, *parts) == f"{root.rstrip('/')}/{'/'.join(parts)}"
    assert join_url(root) == root


@pytest.mark.parametrize("scheme", ["s3", "https", "sftp", "gs", "ftp", "abfs", "anything"])
@given(user=WORDS, password=WORDS, query=WORDS)
def test_no_password_or_signature_survives(scheme: str, user: str, password: str, query: str) -> None:
    shown = strip_credentials(f"{scheme}://u{user}:p{password}@host/data?sig=q{query}")
    assert shown in {f"{scheme}://host/data", f"{scheme}://u{user}@host/data"}
    assert strip_credentials(shown) == shown
    assert (
        strip_credentials(f"simplecache::{scheme}://u{user}:p{password}@host/data?sig=q{query}")
        == f"simplecache::{shown}"
    )


@pytest.mark.parametrize(
    "url",
    [
        "data/a@b:c?d",
        "/a/b",
        "memory://x",
        "s3://bucket/a",
        "file:///a?b",
        "sftp://me@host/a",
        "abfs://box@acct.dfs.core.windows.net/a",
    ],
)
def test_a_url_without_secrets_is_shown_as_it_is(url: str) -> None:
    assert strip_credentials(url) == url


def test_a_folder_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "two words"
    open_storage(folder).put("k", b"x")
    for url in (
        "two words",
        "./two words",
        str(folder),
        f"file://{folder}",
        folder.as_uri(),
        f"file://localhost{folder}",
    ):
        assert open_storage(url).get("k") == b"x"


def test_a_relative_path_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("data")
    monkeypatch.chdir("/")
    storage.put("k", b"x")
    assert open_storage(storage.url).get("k") == (tmp_path / "data" / "k").read_bytes() == b"x"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/data").url == str(tmp_path / "data")


def test_opening_writes_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "new")
    assert list(storage.list()) == []
    assert not (tmp_path / "new").exists()


def test_a_memory_name_is_one_place_in_this_process() -> None:
    name = uuid.uuid4().hex
    open_storage(f"memory://{name}").put("a/b/k", b"x")
    assert open_storage(f"memory://{name}/").get("a/b/k") == b"x"
    assert open_storage(f"memory://{name}/a/b").get("k") == b"x"
    assert list(open_storage(f"memory://{uuid.uuid4().hex}").list()) == []


@pytest.mark.parametrize("make", [str, lambda _: f"memory://{uuid.uuid4().hex}"])
def test_a_url_below_another_names_a_part_of_the_same_bytes(tmp_path: Path, make: object) -> None:
    url = make(tmp_path)  # type: ignore[operator]
    open_storage(join_url(url, "a", "b")).put("k", b"x")
    assert open_storage(url).get("a/b/k") == b"x"
    assert open_storage(open_storage(join_url(url, "a")).url).get("b/k") == b"x"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "the URL is empty"),
        ("  ", "the URL is empty"),
        ("nonsense://x/y", "unknown kind of URL.*scheme='nonsense'"),
        ("simplecache::s3://b/x", "chained URLs are not supported"),
        ("file://host/x", "a file URL has no host"),
        ("file://relative", "a file URL has no host"),
        ("memory://", "the URL names nothing"),
        ("s3://", "the URL names nothing"),
    ],
)
def test_a_wrong_url_is_one_clear_error(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_storage(url)


def test_a_scheme_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DependencyError, match="pip install 'gcsfs'"):
        open_storage("gs://bucket/x")


def test_each_scheme_gets_its_backend(tmp_path: Path) -> None:
    assert isinstance(open_storage(tmp_path), LocalStorage)
    assert isinstance(open_storage("memory://x"), MemoryStorage)
    assert isinstance(open_storage("memory://x/y"), Subfolder)
    assert isinstance(open_storage("s3://bucket/x"), S3Storage)


def test_opening_a_path_imports_no_fsspec() -> None:
    program = (
        "import sys; from datastore.storage.resolve import open_storage; open_storage('x'); open_storage('memory://x')\n"
        "print(sorted({'fsspec', 's3fs', 'pyarrow', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
