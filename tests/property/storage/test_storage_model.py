"""Any history of calls leaves each storage in the state of a plain dictionary."""

import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from datastore.errors import ConflictError, MissingError, StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.wrappers import Subfolder

KEYS = st.sampled_from(["a/b/1", "a/b/2", "a/3", "a-b", "a.txt", "ab/4", "b", "é/ü"])  # none is a folder of another
FOLDERS = st.sampled_from(["", "a", "a/b", "ab", "b", "nothing"])
CHUNKS = st.lists(st.binary(max_size=20), max_size=3)
FULL_CHUNKS = st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3)


class StorageMachine(RuleBasedStateMachine):
    """The model is a dictionary from key to bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[str, bytes] = {}

    @initialize(kind=st.sampled_from(["local", "memory", "subfolder", "fsspec file", "fsspec memory"]))
    def open(self, kind: str) -> None:
        self.storage: Storage = {
            "local": lambda: LocalStorage(self.folder),
            "memory": lambda: MemoryStorage(uuid.uuid4().hex),
            "subfolder": lambda: Subfolder(MemoryStorage(uuid.uuid4().hex), "x/y"),
            "fsspec file": lambda: FsspecStorage(f"file://{self.folder}"),
            "fsspec memory": lambda: FsspecStorage(f"memory://{uuid.uuid4().hex}"),
        }[kind]()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(key=KEYS, chunks=CHUNKS)
    def put(self, key: str, chunks: list[bytes]) -> None:
        self.storage.put(key, *chunks)
        self.model[key] = b"".join(chunks)

    @rule(key=KEYS, chunks=FULL_CHUNKS)
    def put_new(self, key: str, chunks: list[bytes]) -> None:
        if key in self.model:
            with pytest.raises(ConflictError):
                self.storage.put_new(key, *chunks)
        else:
            self.storage.put_new(key, *chunks)
            self.model[key] = b"".join(chunks)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.storage.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS)
    def read_whole(self, key: str) -> None:
        if key in self.model:
            assert self.storage.get(key) == self.model[key]
            assert self.storage.stat(key).size_bytes == len(self.model[key])
        else:
            for read in (self.storage.get, self.storage.stat):
                with pytest.raises(MissingError):
                    read(key)

    @rule(key=KEYS, start=st.integers(0, 40), length=st.integers(1, 40))
    def read_part(self, key: str, start: int, length: int) -> None:
        target = bytearray(length)
        if key not in self.model:
            with pytest.raises(MissingError):
                self.storage.get_ranges(key, [(start, start + length)])
        elif start + length > len(self.model[key]):
            with pytest.raises(StorageError):
                self.storage.read_into(key, start, target)
        else:
            self.storage.read_into(key, start, target)
            ranges = self.storage.get_ranges(key, [(start, start + length), (0, 1)])
            assert ranges == [self.model[key][start : start + length], self.model[key][:1]]
            assert target == ranges[0]

    @rule(folder=FOLDERS)
    def list_folder(self, folder: str) -> None:
        inside = sorted(key for key in self.model if not folder or key.startswith(f"{folder}/"))
        assert [found.key for found in self.storage.list(folder)] == inside

    @invariant()
    def sizes_agree(self) -> None:
        assert [(found.key, found.size_bytes) for found in self.storage.list()] == sorted(
            (key, len(data)) for key, data in self.model.items()
        )


TestStorageModel = StorageMachine.TestCase
TestStorageModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
