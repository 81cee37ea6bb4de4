"""Any history of appends, overwrites, repeats and tags: each version holds exactly what it held when it was made."""

import uuid

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.tags import list_tags, set_tag
from datastore.dataset.operations.append import Operation, commit_shards
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConflictError
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_shard

names = st.sampled_from(["v1", "v2", "best"])


class StoreHistory(RuleBasedStateMachine):
    """The model is a list of versions, each a list of uids, and a map from tag to version."""

    shards: Bundle[ShardInfo] = Bundle("shards")

    @initialize()
    def empty(self) -> None:
        self.storage = MemoryStorage(uuid.uuid4().hex)
        self.versions: list[list[str]] = []
        self.tags: dict[str, int] = {}

    @rule(target=shards, lengths=st.lists(st.integers(0, 9), max_size=4))
    def write_a_shard(self, lengths: list[int]) -> ShardInfo:
        return make_shard(self.storage, uuid.uuid4().hex, lengths=lengths)

    @rule(shards=st.lists(shards, max_size=4, unique_by=lambda shard: shard.uid))
    def append(self, shards: list[ShardInfo]) -> None:
        newest = self.versions[-1] if self.versions else None
        fresh = [shard.uid for shard in shards if shard.uid not in (newest or [])]
        self._commit(shards, "append")
        if newest is None or fresh:
            self.versions.append([*(newest or []), *fresh])

    @rule(shards=st.lists(shards, max_size=4, unique_by=lambda shard: shard.uid))
    def overwrite(self, shards: list[ShardInfo]) -> None:
        self._commit(shards, "overwrite")
        self.versions.append([shard.uid for shard in shards])

    @precondition(lambda self: self.versions)
    @rule(name=names, data=st.data())
    def tag(self, name: str, data: st.DataObject) -> None:
        version = data.draw(st.integers(1, len(self.versions)))
        commit = open_dataset(self.storage, version=version).commit
        try:
            set_tag(self.storage, name, commit)
        except ConflictError:
            assert self.tags[name] != version
        else:
            assert self.tags.setdefault(name, version) == version

    @invariant()
    def every_version_holds_what_it_held(self) -> None:
        for version, uids in enumerate(self.versions, start=1):
            dataset = open_dataset(self.storage, version=version)
            assert [shard.uid for shard in dataset.segments] == uids
            assert dataset.totals.shards == len(uids)
            assert dataset.totals.tokens == int(dataset.segments.tokens.sum())

    @invariant()
    def tags_name_the_versions_they_were_given(self) -> None:
        assert list_tags(self.storage) == sorted(self.tags)
        for name, version in self.tags.items():
            assert open_dataset(self.storage, tag=name).version == version

    @invariant()
    def the_log_is_whole(self) -> None:
        if self.versions:
            newest = open_dataset(self.storage)
            assert newest.version == len(self.versions)
            assert len(list(CommitLog(self.storage).history(newest.commit))) == len(self.versions)

    def teardown(self) -> None:
        if self.versions:
            assert verify(open_dataset(self.storage)).ok

    def _commit(self, shards: list[ShardInfo], operation: Operation) -> None:
        commit_shards(self.storage, shards, operation=operation)


TestStoreHistory = StoreHistory.TestCase
TestStoreHistory.settings = settings(deadline=None, max_examples=30, stateful_step_count=20)
