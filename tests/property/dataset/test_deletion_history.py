"""Any history of appends, deletes, purges, compacts and overwrites: each version holds what the model says, or has expired."""

import uuid
from dataclasses import dataclass, replace

import pyarrow.compute as pc
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import DeleteReport, delete
from datastore.dataset.operations.purge.plan import list_certificates
from datastore.dataset.operations.purge.purge import PurgeReport, purge
from datastore.dataset.shards.files import shard_uid
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import sha256_hex
from datastore.errors import ConflictError, MissingError
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_shard

lengths = st.lists(st.lists(st.integers(8, 20), min_size=1, max_size=4), min_size=1, max_size=3)
choices = st.lists(st.integers(0, 50), min_size=1, max_size=4)


@dataclass(frozen=True)
class Document:
    """What the model knows of a document: its id, the bytes of its tokens, and whether it is deleted."""

    name: str
    tokens: bytes
    deleted: bool = False


Version = list[Document]
BLANK = Document("", b"", deleted=True)
"""A row that was purged."""


def rows_of(dataset: Dataset) -> Version:
    """All rows of a version, deleted ones too."""
    found = []
    for index in range(len(dataset.segments)):
        values, offsets = dataset.token_shard(index)
        names = dataset.documents(index).column("id").to_pylist()
        deleted = set(dataset.deletions.rows(dataset.segments.shard(index).uid).tolist())
        for row, name in enumerate(names):
            tokens = values[offsets[row] : offsets[row + 1]].tobytes()
            found.append(Document(name, tokens, row in deleted) if name else BLANK)
    return found


def live(documents: Version) -> Version:
    return [document for document in documents if not document.deleted]


class DeletionHistory(RuleBasedStateMachine):
    """The model is a list of versions, each a list of documents, and the oldest version that can be read."""

    @initialize(shards=lengths)
    def begin(self, shards: list[list[int]]) -> None:
        self.storage = MemoryStorage(uuid.uuid4().hex)
        self.versions: list[Version] = [[]]
        self.oldest = 1
        self.purged: dict[str, bytes] = {}
        """Tokens of documents that no version has any more."""
        self._commit(shards, "append")
        self.versions.pop(0)
        self.opened = open_dataset(self.storage)

    @rule(shards=lengths)
    def append(self, shards: list[list[int]]) -> None:
        self._commit(shards, "append")

    @rule(shards=lengths)
    def overwrite(self, shards: list[list[int]]) -> None:
        self._commit(shards, "overwrite")

    @rule(chosen=choices)
    def delete_some(self, chosen: list[int]) -> None:
        named = [document for document in self.versions[-1] if document is not BLANK]
        names = {named[index % len(named)].name for index in chosen} if named else set[str]()
        self._deleted(delete(self.storage, ids=names), {d.name for d in named if d.name in names and not d.deleted})

    @rule(length=st.integers(8, 20))
    def delete_by_length(self, length: int) -> None:
        names = {d.name for d in live(self.versions[-1]) if len(d.tokens) == 2 * length}
        self._deleted(delete(self.storage, where=(pc.field("tokens") == length) & (pc.field("id") != "")), names)

    def _deleted(self, report: DeleteReport, names: set[str]) -> None:
        assert (report.documents, report.committed) == (len(names), bool(names))
        if names:
            self.versions.append([replace(d, deleted=True) if d.name in names else d for d in self.versions[-1]])

    @rule(size=st.sampled_from([600, 1200, 10**6]))
    def compact_it(self, size: int) -> None:
        report = compact(self.storage, target_bytes=size)
        if report.committed:
            gone = sum(document.deleted for document in self.versions[-1])
            assert report.dropped_documents == gone
            self.versions.append([document for document in self.versions[-1] if not document.deleted])

    @rule()
    def purge_it(self) -> None:
        names = {d.name for d in self.versions[-1] if d.deleted and d is not BLANK}
        report = purge(self.storage)
        assert report.documents == len(names)
        if report.committed:
            self._purged(report)

    def _purged(self, report: PurgeReport) -> None:
        certificate = report.certificate
        assert certificate is not None
        gone = set(certificate.ids_sha256)
        self.versions.append([BLANK if sha256_hex(d.name.encode()) in gone else d for d in self.versions[-1]])
        self.oldest = report.oldest
        kept = {d.name for version in self.versions[self.oldest - 1 :] for d in version}
        lost = {d.name: d for version in self.versions for d in version if d.name not in kept and d is not BLANK}
        # A shard of a compact that gave way, made from members that have not changed, is left for whoever tries again.
        if not certificate.files_unnamed:
            self.purged |= {name: document.tokens for name, document in lost.items()}

    @rule()
    def open_it(self) -> None:
        self.opened = open_dataset(self.storage)

    @rule(operation=st.sampled_from(["delete", "compact", "purge"]))
    def change_what_was_opened_before(self, operation: str) -> None:
        """It merges with appends and changes of other shards, or gives way."""
        newest = open_dataset(self.storage)
        try:
            if operation == "delete":
                report = delete(self.opened, where=(pc.field("tokens") == 12) & (pc.field("id") != ""))
            else:
                report = (compact if operation == "compact" else purge)(self.opened)
        except ConflictError:
            assert self.opened.version < newest.version
            assert open_dataset(self.storage).commit == newest.commit
            return
        finally:
            self.opened = open_dataset(self.storage)
        if not report.committed:
            assert self.opened.commit == newest.commit
        elif isinstance(report, PurgeReport):
            self._purged(report)
        else:
            before, found = live(self.versions[-1]), rows_of(self.opened)
            lost = [document for document in before if document not in live(found)]
            assert [document for document in before if document not in lost] == live(found)
            assert all(operation == "delete" and len(document.tokens) == 24 for document in lost)
            self.versions.append(found)

    @invariant()
    def the_newest_version_holds_what_it_should(self) -> None:
        self._check(len(self.versions))

    def _check(self, version: int) -> None:
        dataset = open_dataset(self.storage, version=version)
        documents, totals = self.versions[version - 1], dataset.totals
        assert rows_of(dataset) == documents
        assert totals.documents - totals.deleted_documents == len(live(documents))
        assert totals.deleted_documents == dataset.deletions.documents
        assert totals.deleted_tokens == dataset.deletions.tokens

    @invariant()
    def what_was_purged_is_nowhere(self) -> None:
        everything = b"".join(self.storage.get(stat.key) for stat in self.storage.list("shards"))
        assert not [name for name, tokens in self.purged.items() if tokens in everything]

    def teardown(self) -> None:
        if not hasattr(self, "storage"):
            return
        for version in range(1, len(self.versions) + 1):
            if version >= self.oldest:
                self._check(version)
                continue
            with pytest.raises(MissingError, match="expired"):
                open_dataset(self.storage, version=version)
        newest = open_dataset(self.storage)
        assert newest.version == len(self.versions)
        assert verify(newest).ok
        assert all(certificate.finished for certificate in list_certificates(self.storage))

    def _commit(self, shards: list[list[int]], operation: str) -> None:
        infos = [make_shard(self.storage, shard_uid(uuid.uuid4().hex, 0), lengths=each) for each in shards]
        commit_shards(self.storage, infos, operation=operation)  # type: ignore[arg-type]
        added = rows_of(open_dataset(self.storage))[-sum(map(len, shards)) :]
        self.versions.append([*(self.versions[-1] if operation == "append" else []), *added])


TestDeletionHistory = DeletionHistory.TestCase
TestDeletionHistory.settings = settings(deadline=None, max_examples=30, stateful_step_count=15)
