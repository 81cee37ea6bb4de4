"""Chats as a source: which records are chats, what of them is learned, and why others are set aside."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from datastore.dataset.journal import Journal
from datastore.dataset.shards.files import read_token_table
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, RejectedError
from datastore.ingestion.encoding.chats import ChatEncoder, UnusableChatError
from datastore.ingestion.encoding.template import ChatFormat, ChatTemplate, TemplateRefusedError
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.estimate import estimate
from datastore.ingestion.ingest import ingest
from datastore.ingestion.reading.chats import chat_text, pair_text
from datastore.ingestion.reading.documents import decode_rejects
from datastore.ingestion.report import IngestReport
from datastore.ingestion.settings import IngestSettings
from datastore.storage.backends.memory import MemoryStorage

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No!"}


@pytest.fixture(scope="module")
def raw() -> bytes:
    MemoryStorage("chats-corpus").put("a.txt", ("Hi? Yes. No! user assistant system\n" * 50).encode())
    special = ("<|im_start|>", "<|im_end|>")
    return train_tokenizer(
        ["memory://chats-corpus"], settings=TokenizerSettings(vocab_size=300, special_tokens=special)
    )


class Chats:
    """Ingests records into one dataset with one template."""

    def __init__(self, folder: Path, raw: bytes) -> None:
        self.folder = folder
        self.url = str(folder / "data")
        (folder / "tok").mkdir()
        (folder / "tok" / "tokenizer.json").write_bytes(raw)
        self.template(CHATML)

    def template(self, text: str) -> None:
        (self.folder / "tok" / "chat_template.jinja").write_text(text)

    def settings(self, **settings: Any) -> IngestSettings:
        return IngestSettings(**{"tokenizer": str(self.folder / "tok"), "take": "chats", "workers": 1} | settings)

    def lines(self, rows: Sequence[Any]) -> str:
        path = self.folder / "x.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    def run(self, rows: Sequence[Any], **settings: Any) -> IngestReport:
        return ingest([self.lines(rows)], self.url, settings=self.settings(**settings))

    @property
    def dataset(self) -> Dataset:
        return open_dataset(self.url)

    def learned(self) -> list[str]:
        """Return what is to be learned of each document."""
        tokenizer = Tokenizer.from_buffer((self.folder / "tok" / "tokenizer.json").read_bytes())
        found = []
        for shard in self.dataset.segments:
            stored = read_token_table(self.dataset.storage, shard)
            for start, stop in zip(stored.offsets[:-1], stored.offsets[1:], strict=True):
                ids, mask = stored.values[start:stop], stored.columns["loss_mask"][start:stop]
                found.append(tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=False))
        return found


@pytest.fixture
def chats(tmp_path: Path, raw: bytes) -> Chats:
    return Chats(tmp_path, raw)


def test_both_shapes_of_a_chat_give_the_same_document(chats: Chats) -> None:
    shared = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}
    chats.run([{"messages": [USER, ASSISTANT]}, shared])
    assert chats.learned() == ["Yes.<|im_end|>"] * 2
    digests = chats.dataset.documents(0).column("digest").to_pylist()
    assert digests[0] == digests[1]


def test_chats_in_parquet_are_those_in_json(chats: Chats) -> None:
    rows = [{"id": "a", "messages": [USER, ASSISTANT]}, {"id": "b", "messages": [USER, {**OTHER, "name": "x"}]}]
    pq.write_table(pa.Table.from_pylist(rows), chats.folder / "x.parquet")
    ingest([str(chats.folder / "x.parquet")], chats.url, settings=chats.settings())
    assert chats.learned() == ["Yes.<|im_end|>", "No!<|im_end|>"]
    assert chats.dataset.documents(0).column("id").to_pylist() == ["a", "b"]


def test_chats_in_an_array_of_json_are_those_in_lines(chats: Chats) -> None:
    (chats.folder / "x.json").write_text(json.dumps([{"messages": [USER, ASSISTANT]}, {"messages": [USER, OTHER]}]))
    ingest([str(chats.folder / "x.json")], chats.url, settings=chats.settings())
    assert chats.learned() == ["Yes.<|im_end|>", "No!<|im_end|>"]


BAD: list[tuple[Any, str]] = [
    ("{", "invalid_json"),
    ("[1]", "invalid_json"),
    ({"text": "x"}, "no_messages"),
    ({"messages": []}, "no_messages"),
    ({"messages": "Hi"}, "no_messages"),
    ({"messages": ["Hi"]}, "bad_message"),
    ({"messages": [{"content": "Hi"}]}, "bad_message"),
    ({"messages": [{"role": "user"}, ASSISTANT]}, "bad_message"),
    ({"messages": [{"role": "user", "content": 7}, ASSISTANT]}, "content_not_text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]}, "content_not_text"),
    ({"messages": [{"role": "user", "content": "a\0"}, ASSISTANT]}, "nul"),
    ({"messages": [USER, ASSISTANT], "tools": "{"}, "bad_tools"),
    ({"messages": [USER]}, "no_answer"),
    ({"messages": [{"role": "user", "content": "a\ufdd0"}, ASSISTANT]}, "template_refused"),
    ({"messages": [USER, ASSISTANT], "id": 1.5}, "id_not_text"),
]


def test_what_is_no_chat_is_counted_and_the_others_arrive(chats: Chats) -> None:
    good = {"messages": [USER, ASSISTANT]}
    report = chats.run([good, *(row for row, _ in BAD), good], max_reject_ratio=1.0)
    assert report.documents == 2
    expected = [reason for _, reason in BAD]
    journal = Journal(chats.dataset.storage, report.ingest_id)
    found = [each for key, data in journal.rejects() for each in decode_rejects(data, where=key)]
    assert [each.reason for each in sorted(found, key=lambda each: each.offset)] == expected
    assert report.rejected == {reason: expected.count(reason) for reason in sorted(set(expected))}


def test_a_role_that_the_template_leaves_out_is_told(chats: Chats) -> None:
    chats.template(
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RejectedError, match=r"message_dropped.*message 0 \(critic\) is not in the"):
        chats.run([{"messages": [{"role": "critic", "content": "Hm"}, USER, ASSISTANT]}], on_error="fail")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}


@pytest.mark.parametrize("more", [{"tools": [CALL]}, {"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}]}])
def test_tools_and_calls_that_the_template_leaves_out_are_told(chats: Chats, more: dict[str, Any]) -> None:
    with pytest.raises(RejectedError, match="message_dropped"):
        chats.run([{"messages": [USER, ASSISTANT]} | more], on_error="fail")


def test_what_the_template_says_is_told(chats: Chats) -> None:
    chats.template("{{ raise_exception('no such role') if messages[0].role != 'user' }}" + CHATML)
    with pytest.raises(RejectedError, match=r"template_refused.*no such role"):
        chats.run([{"messages": [{"role": "critic", "content": "Hm"}, USER, ASSISTANT]}], on_error="fail")


REWRITES = CHATML.replace("{{ message.content }}", "{{ '(last) ' if loop.last }}{{ message.content }}")


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(chats: Chats) -> None:
    chats.template(REWRITES)
    with pytest.raises(ConfigError, match=r"does not tell where answers are.*chat_template\.jinja") as caught:
        chats.run([{"messages": [USER, ASSISTANT]}])
    assert "{% generation %}" in caught.value.hint
    assert not Path(chats.url).exists()


def test_such_a_template_is_taken_if_it_marks_its_answers(chats: Chats) -> None:
    body = "{% if message.role == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}BODY{% endif %}"
    text = "{{ '(last) ' if loop.last }}{{ message.content }}"
    chats.template(REWRITES.replace(text, body.replace("BODY", text)))
    chats.run([{"messages": [USER, ASSISTANT, USER, OTHER]}])
    assert chats.learned() == ["Yes.(last) No!"]


def test_marks_are_right_in_a_macro_too() -> None:
    macro = "{% macro say(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
    text = (
        macro
        + "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ say(m) }}{% endif %}{% endfor %}"
    )
    found = ChatTemplate(ChatFormat(template=text, variables={}), []).render([USER, ASSISTANT])
    assert found.text == "Hi?[Yes.]"
    assert [found.text[start:stop] for start, stop in found.answers] == ["Yes."]


def test_a_template_cannot_leave_its_sandbox() -> None:
    text = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(TemplateRefusedError):
        ChatTemplate(ChatFormat(template=text, variables={}), []).render([USER])


def test_escaped_chats_are_counted(chats: Chats) -> None:
    report = chats.run(
        [{"messages": [{"role": "user", "content": "a<|im_end|>b"}, ASSISTANT]}, {"messages": [USER, OTHER]}]
    )
    assert (report.documents, report.escaped) == (2, 1)
    assert chats.learned() == ["Yes.<|im_end|>", "No!<|im_end|>"]


@pytest.mark.parametrize("place", ["role", "name of an argument", "tools"])
def test_no_string_of_a_record_brings_a_special_token_in(raw: bytes, place: str) -> None:
    template = CHATML.replace(
        "{{ message.content }}", "{{ message.content }}{{ message.calls | tojson }}{{ tools | tojson }}"
    )
    bad = "x<|im_end|>"
    user = {
        **USER,
        "role": bad if place == "role" else "user",
        "calls": {bad: 1} if place == "name of an argument" else {},
    }
    tools = [{"name": bad}] if place == "tools" else [{"name": "x"}]
    encoder = ChatEncoder(raw, ChatFormat(template=template, variables={}), "escape")
    found = encoder.encode(json.dumps({"messages": [user, {**ASSISTANT, "calls": {}}], "tools": tools}))
    end = Tokenizer.from_buffer(raw).token_to_id("<|im_end|>")
    assert found.escaped
    assert (found.ids == end).sum() == 2


@pytest.mark.parametrize("cut", ["[1:]", "[:-1]"])
def test_a_token_that_has_lost_one_of_its_marks_is_escaped_all_the_same(cut: str) -> None:
    form = ChatFormat(template=f"{{% for m in messages %}}{{{{ m.content{cut} }}}}<|end|>{{% endfor %}}", variables={})
    found = ChatTemplate(form, ["<|end|>"]).render([{"role": "user", "content": "<|end|>"}])
    assert found.text == "<|end|><|end|>"
    assert found.escaped == [(0, 7)]


def test_a_tokenizer_that_cannot_escape_refuses_the_chat(raw: bytes) -> None:
    # Its first word has a blank before it, and so has each piece that is encoded alone.
    config = json.loads(raw)
    config["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    config["model"]["vocab"] |= {"▁": 400}
    changed = json.dumps(config).encode()
    encoder = ChatEncoder(
        changed,
        ChatFormat(template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", variables={}),
        "escape",
    )
    plain = encoder.encode(json.dumps({"messages": [USER, ASSISTANT]}))
    assert not plain.escaped
    with pytest.raises(UnusableChatError, match="cannot escape it"):
        encoder.encode(json.dumps({"messages": [{"role": "user", "content": "a<|im_end|>b"}, ASSISTANT]}))


def test_a_day_that_a_template_asks_for_is_part_of_what_is_ingested(chats: Chats) -> None:
    chats.template("{{ strftime_now('%d %b %Y') }}" + CHATML)
    source = chats.lines([{"messages": [USER, ASSISTANT]}])
    ids = set()
    for day in ("2024-07-26", "2024-07-27", "2024-07-26"):
        chats.url = str(chats.folder / f"data-{len(ids)}-{day}")
        ids.add(ingest([source], chats.url, settings=chats.settings(chat_day=day)).ingest_id)
        text = Tokenizer.from_buffer((chats.folder / "tok" / "tokenizer.json").read_bytes()).decode(
            chats.dataset.token_shard(0)[0].tolist()
        )
        assert text.startswith(f"{day[-2:]} Jul 2024")
    assert len(ids) == 2


def test_a_repeated_id_leaves_the_masks_of_the_others_in_place(chats: Chats) -> None:
    rows = [{"id": name, "messages": [USER, answer]} for name, answer in (("a", ASSISTANT), ("a", OTHER), ("b", OTHER))]
    report = chats.run(rows, max_reject_ratio=1.0)
    assert report.rejected == {"duplicate_id": 1}
    assert chats.learned() == ["Yes.<|im_end|>", "No!<|im_end|>"]


def test_without_a_template_or_a_tokenizer_nothing_begins(chats: Chats) -> None:
    (chats.folder / "tok" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        chats.run([{"messages": [USER, ASSISTANT]}])
    with pytest.raises(ConfigError, match="chats need a tokenizer"):
        chats.run([{"messages": [USER, ASSISTANT]}], tokenizer="")
    other = chats.folder / "other.jinja"
    other.write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"not a chat template.*other\.jinja"):
        chats.run([{"messages": [USER, ASSISTANT]}], chat_template=str(other))
    other.write_text("{{ bos_token }}" + CHATML)
    with pytest.raises(ConfigError, match=r"needs what nobody says.*bos_token"):
        chats.run([{"messages": [USER, ASSISTANT]}], chat_template=str(other))
    assert not Path(chats.url).exists()


def test_a_token_that_only_the_config_names_is_refused(chats: Chats) -> None:
    config = chats.folder / "tok" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
    chats.template(CHATML + "{{ eos_token }}")
    with pytest.raises(ConfigError, match=r"does not have as special ones.*'eos_token': '<eos>'") as caught:
        chats.run([{"messages": [USER, ASSISTANT]}])
    assert "pad_token" not in str(caught.value)


def test_an_estimate_counts_tokens_and_rejects(chats: Chats) -> None:
    source = chats.lines([{"messages": [USER, ASSISTANT]}] * 20 + [{"messages": [USER]}])
    expected = estimate([source], chats.url, settings=chats.settings())
    assert (expected.kind, expected.documents, expected.rejects) == ("tokens", 20, 1)
    report = ingest([source], chats.url, settings=chats.settings(max_reject_ratio=1.0))
    assert expected.tokens == pytest.approx(report.tokens, rel=0.05)


PAIRS: list[dict[str, Any]] = [
    {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No!"},
    {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    {"prompt": "Hi?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
]


def test_all_shapes_of_a_pair_give_the_same_record(chats: Chats) -> None:
    report = chats.run(PAIRS, take="pairs")
    assert (report.kind, report.documents) == ("records", 4)
    rows = [{name: row[name] for name in row if name not in {"id", "offset"}} for row in chats.dataset.iter_records()]
    assert rows == [rows[0]] * 4
    tokenizer = Tokenizer.from_buffer((chats.folder / "tok" / "tokenizer.json").read_bytes())
    for side, answer in (("chosen", "Yes."), ("rejected", "No!")):
        ids, mask = rows[0][side], rows[0][f"{side}_mask"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == (
            f"<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
        learned = [token for token, is_learned in zip(ids, mask, strict=True) if is_learned]
        assert tokenizer.decode(learned, skip_special_tokens=False) == f"{answer}<|im_end|>"


def test_of_a_pair_only_what_differs_is_learned(raw: bytes) -> None:
    encoder = ChatEncoder(raw, ChatFormat(template=CHATML, variables={}), "escape")
    pair = {"prompt": [USER, ASSISTANT, USER], "chosen": "Yes.", "rejected": "No!"}
    chosen, rejected = encoder.encode_pair(pair_text(pair))
    decode = Tokenizer.from_buffer(raw).decode
    assert decode(chosen.ids[chosen.mask].tolist(), skip_special_tokens=False) == "Yes.<|im_end|>"
    assert decode(rejected.ids[rejected.mask].tolist(), skip_special_tokens=False) == "No!<|im_end|>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi?", "chosen": "Yes."}, "no_messages"),
        ({"prompt": "Hm?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, "pair_disagrees"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."}, "no_answer"),
    ],
)
def test_what_is_no_pair_is_set_aside(chats: Chats, row: dict[str, Any], reason: str) -> None:
    report = chats.run([*PAIRS, row], take="pairs", max_reject_ratio=1.0)
    assert report.rejected == {reason: 1}


def test_more_pairs_can_be_added_and_chats_cannot(chats: Chats) -> None:
    chats.run(PAIRS[:1], take="pairs")
    chats.run(PAIRS[:2], take="pairs")
    assert chats.dataset.totals.documents == 3
    with pytest.raises(ConfigError, match="holds records, not tokens"):
        chats.run([{"messages": [USER, ASSISTANT]}])


def test_long_numbers_in_a_call_stay_what_they_are() -> None:
    assert str(2**70) in chat_text({"messages": [{**USER, "calls": {"x": 2**70}}]})
