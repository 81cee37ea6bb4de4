"""After any history of operations and vacuums, every version that can be read verifies, and nothing else takes space."""

import uuid

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, precondition, rule

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.tags import list_tags, read_tag, remove_tag, set_tag
from datastore.dataset.operations.append import Operation, commit_shards
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.operations.vacuum import DAY_S, vacuum
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import keys_of_versions
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConflictError, MissingError
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset, make_shard

names = st.sampled_from(["v1", "v2"])
DATA = ("shards/", "docs/", "_segments/", "deletions/")


class VacuumHistory(RuleBasedStateMachine):
    """The model is what each version held when it was made. Shards come in late: some are never committed."""

    shards: Bundle[ShardInfo] = Bundle("shards")

    @initialize()
    def begin(self) -> None:
        self.storage = MemoryStorage(uuid.uuid4().hex)
        made = make_dataset(self.storage, [[3, 1, 2], [4]])
        self.held = {1: self._content(1)}
        assert made.version == 1

    @rule(target=shards, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def write_a_shard(self, lengths: list[int]) -> ShardInfo:
        return make_shard(self.storage, uuid.uuid4().hex, lengths=lengths)

    @rule(shard=consumes(shards), operation=st.sampled_from(["append", "append", "overwrite"]))
    def commit(self, shard: ShardInfo, operation: Operation) -> None:
        # What a writer has stored it commits within a day, or stores again.
        shard = make_shard(self.storage, shard.uid, lengths=[7, 7])
        commit_shards(self.storage, [shard], operation=operation)
        self._remember()

    @precondition(lambda self: open_dataset(self.storage).segments)
    @rule(data=st.data())
    def delete_a_document(self, data: st.DataObject) -> None:
        dataset = open_dataset(self.storage)
        index = data.draw(st.integers(0, len(dataset.segments) - 1))
        ids = dataset.documents(index)["id"].to_pylist()
        if delete(self.storage, ids=[data.draw(st.sampled_from(ids))]).committed:
            self._remember()

    @rule(target_bytes=st.sampled_from([500, 2000, 10**6]))
    def compact(self, target_bytes: int) -> None:
        before = open_dataset(self.storage).version
        compact(self.storage, target_bytes=target_bytes)
        if open_dataset(self.storage).version != before:
            self._remember()

    @rule()
    def purge_what_is_deleted(self) -> None:
        before = open_dataset(self.storage).version
        purge(self.storage, drop_tags=True)
        for version in range(before + 1, open_dataset(self.storage).version + 1):
            if version >= open_dataset(self.storage).commit.min_version:
                self.held[version] = self._content(version)

    @rule(name=names, data=st.data())
    def tag(self, name: str, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.held)))
        try:
            set_tag(self.storage, name, open_dataset(self.storage, version=version).commit)
        except (ConflictError, MissingError):
            return

    @rule(name=names)
    def untag(self, name: str) -> None:
        remove_tag(self.storage, name)

    @rule(keep=st.integers(1, 4))
    def expire(self, keep: int) -> None:
        if expire(self.storage, keep_last=keep).expired:
            self._remember()

    @rule(days=st.sampled_from([0.5, 1.5]))
    def wait(self, days: float) -> None:
        for key, (raw, written) in self.storage._values.items():
            self.storage._values[key] = (raw, written - days * DAY_S)

    @rule()
    def vacuum(self) -> None:
        told = vacuum(self.storage)
        done = vacuum(self.storage, dry_run=False)
        assert (told.removed, told.young) == (done.removed, done.young)
        oldest = open_dataset(self.storage).commit.min_version
        for version in self.held:
            if version >= oldest:
                assert self._content(version) == self.held[version]
                assert verify(open_dataset(self.storage, version=version)).ok
        commits = [open_dataset(self.storage, version=version).commit for version in self.held if version >= oldest]
        needed = {key for part in keys_of_versions(self.storage, commits) for key in part}
        present = {stat.key: stat for stat in self.storage.list() if stat.key.startswith(DATA)}
        spare = [stat for key, stat in present.items() if key not in needed]
        assert len(spare) == done.young.files
        assert vacuum(self.storage).removed == {}

    def teardown(self) -> None:
        self.wait(1.5)
        self.vacuum()
        for name in list_tags(self.storage):
            assert open_dataset(self.storage, tag=name).version == read_tag(self.storage, name).version

    def _content(self, version: int) -> list[str]:
        dataset = open_dataset(self.storage, version=version)
        return [
            name for index in range(len(dataset.segments)) for name in dataset.live_documents(index)["id"].to_pylist()
        ]

    def _remember(self) -> None:
        version = open_dataset(self.storage).version
        self.held[version] = self._content(version)


TestVacuumHistory = VacuumHistory.TestCase
TestVacuumHistory.settings = settings(deadline=None, max_examples=20, stateful_step_count=20)
