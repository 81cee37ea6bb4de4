"""The pages: what each answers, who is answered at all, and that nothing is written."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

import datastore as ds
from datastore.ui.app import make_app
from datastore.ui.datasets import planned, sources_of
from datastore.ui.places import Places

TOKEN = "right"
HOST = "127.0.0.1:8000"

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of tokens with three versions, one of records with a picture and a chat, and two runs of one."""
    root = tmp_path_factory.mktemp("ui")
    rows = [
        {"id": f"doc-{number}", "text": f"The {number}th text: <b>bold</b> & more. " * (1 + number % 9)}
        for number in range(200)
    ]
    (root / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (root / "more.jsonl").write_bytes(orjson.dumps({"id": "late", "text": "It came later."}))
    tokenizer = ds.train_tokenizer([str(root / "rows.jsonl")], settings=ds.TokenizerSettings(vocab_size=400))
    (root / "tok.json").write_bytes(tokenizer)
    settings = ds.IngestSettings(tokenizer=str(root / "tok.json"), shard_bytes=8_192, task_bytes=16_384, workers=1)
    ds.ingest(root / "rows.jsonl", root / "all" / "tokens", settings=settings)
    ds.ingest(root / "more.jsonl", root / "all" / "tokens", settings=settings)
    ds.delete(root / "all" / "tokens", ids=["doc-7"])
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<i>Me</i>."}]
    with ds.record_writer(root / "all" / "records") as writer:
        writer.write(pa.table({"picture": pa.array([PNG], pa.binary()), "messages": [turns], "n": [4]}))
    run = ds.load_settings(
        ds.RunSettings,
        Path(__file__).parents[3] / "docs" / "recipes" / "pretrain.toml",
        overrides=[
            f"data.url={root}/all/tokens",
            "data.seq_len=16",
            "train.steps=6",
            "checkpoint.every=3",
            "eval.every=3",
        ],
    )
    ds.train(run, root / "all" / "runs" / "first")
    return root / "all"


@pytest.fixture
def client(ground: Path) -> Iterator[TestClient]:
    places = Places([str(ground)])
    places.look()
    app = make_app(places, token=TOKEN, hosts=frozenset({HOST}))
    with TestClient(app, base_url=f"http://{HOST}", cookies={"datastore": TOKEN}) as found:
        yield found


def text_of(client: TestClient, address: str, *, status: int = 200) -> str:
    answer = client.get(address)
    assert answer.status_code == status, answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return answer.text


def number_of(client: TestClient, name: str) -> str:
    found = re.search(rf'href="(/datasets/\d+)">[^<]*/{name}<', text_of(client, "/"))
    assert found
    return found[1]


def test_only_who_has_the_token_is_answered(client: TestClient) -> None:
    client.cookies.clear()
    for address in ("/", "/runs", "/static/app.js", "/data/lines", "/?token=wrong"):
        assert client.get(address).status_code == 403
    first = client.get("/runs", params={"token": TOKEN, "name": "lr"}, follow_redirects=False)
    assert (first.status_code, first.headers["location"]) == (303, f"http://{HOST}/runs?name=lr")
    assert "httponly" in first.headers["set-cookie"].lower()
    assert "samesite=strict" in first.headers["set-cookie"].lower()
    assert client.get("/").status_code == 200


def test_other_hosts_and_methods_are_turned_away(client: TestClient) -> None:
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 421
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/").status_code == 405


def test_the_first_page_lists_what_there_is(client: TestClient, ground: Path) -> None:
    shown = text_of(client, "/")
    assert "2 datasets, 1 run" in shown
    assert f"{ground}/tokens" in shown
    assert ">finished<" in shown


def test_a_dataset_shows_its_versions_with_what_each_changed(client: TestClient) -> None:
    shown = text_of(client, number_of(client, "tokens"))
    assert [name for name in ("create", "append", "delete") if f">{name}<" in shown] == ["create", "append", "delete"]
    assert "+200</span> documents" in shown
    assert "-1</span> documents" in shown
    change = text_of(client, f"{number_of(client, 'tokens')}/versions/3")
    assert "doc-7" in change
    assert ">-<" in change


def test_an_older_version_is_shown_as_it_was(client: TestClient) -> None:
    address = number_of(client, "tokens")
    assert "late" not in text_of(client, f"{address}/documents?version=1&q=late&row=0").split("<table")[1]
    assert "late" in text_of(client, f"{address}/documents?version=2&q=late").split("<table")[1]


def followed(client: TestClient, address: str) -> Iterator[str]:
    """Yield a page of documents and those that come after it; a search ends a page when its time is up, whenever that is."""
    path = address.partition("?")[0]
    while address:
        yield (shown := text_of(client, address))
        found = re.search(r'rel="next" data-search="1?" href="([^"]*)"', shown)
        address = f"{path}{unescape(found[1])}" if found else ""


def names_of(shown: str) -> list[str]:
    return re.findall(r"version=3\">([^<]*)</a>", shown.split("<tbody>")[1].split("</tbody>", maxsplit=1)[0])


@pytest.mark.parametrize(
    ("query", "hits"),
    [
        ("q=DOC-19", {"doc-19", *(f"doc-{number}" for number in range(190, 200))}),
        ("q=77th text&inside=1", {"doc-77", "doc-177"}),
        ("where=tokens > 1 AND id = 'doc-5'", {"doc-5"}),
        ("source=*more*", {"late"}),
        ("q=nothing has this", set()),
    ],
)
def test_a_search_finds_what_is_meant(client: TestClient, query: str, hits: set[str]) -> None:
    pages = list(followed(client, f"{number_of(client, 'tokens')}/documents?version=3&{query}"))
    found = [name for shown in pages for name in names_of(shown)]
    assert sorted(found) == sorted(hits)
    assert "looked at 201 of 201 documents" in pages[-1]


def test_pages_of_a_list_name_every_document_once(client: TestClient) -> None:
    pages = followed(client, f"{number_of(client, 'tokens')}/documents?version=3")
    seen = [name for shown in pages for name in names_of(shown)]
    assert sorted(seen) == sorted([*(f"doc-{number}" for number in range(200)), "late"])


def test_a_document_is_shown_token_by_token_and_escaped(client: TestClient) -> None:
    shown = text_of(client, f"{number_of(client, 'tokens')}/documents/0/3")
    pieces = re.findall(r'<span class="t\d" title="\d+">(.*?)</span>', shown, re.DOTALL)
    assert unescape("".join(pieces)).startswith("The 3th text: <b>bold</b> & more. ")
    assert "<b>bold" not in shown


def test_a_record_is_shown_as_what_it_is(client: TestClient) -> None:
    shown = text_of(client, f"{number_of(client, 'records')}/documents/0/0")
    image = re.search(r'<img src="([^"]*)"', shown)
    assert image
    answer = client.get(unescape(image[1]))
    assert (answer.content, answer.headers["content-type"]) == (PNG, "image/png")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "&lt;i&gt;Me&lt;/i&gt;." in shown
    assert 'class="turn assistant"' in shown


def test_shards_health_and_plan(client: TestClient, ground: Path) -> None:
    shown = text_of(client, f"{number_of(client, 'tokens')}/shards")
    count = ds.open(ground / "tokens").totals.shards
    assert shown.count("<rect") == count + 5
    assert "beyond repair" in shown
    plan = text_of(client, f"{number_of(client, 'tokens')}/plan?ranks=2&steps=3&seq_len=16&global_batch=8")
    assert plan.count("<g><title>") == 6


def test_the_plan_is_that_of_the_loaders(ground: Path) -> None:
    data, sizes = ds.open(ground / "tokens"), {"seq_len": 16, "global_batch": 12, "seed": 3}
    found = {(each.rank, each.step): each.shards for each in planned(data, ranks=5, steps=4, **sizes)}
    ends = np.cumsum(data.segments.tokens)
    for rank in range(5):
        with ds.Loader(data, rank=ds.Rank(rank, 5), **sizes) as loader:
            for step, samples in enumerate(loader.plan(4)):
                shards = np.searchsorted(ends, samples * 16, side="right").tolist()
                assert found[rank, step] == tuple(sorted(Counter(shards).items()))


def test_deleted_documents_are_in_no_histogram(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "src" / name / f"{number}.txt").write_text("text")
    ds.ingest(tmp_path / "src", tmp_path / "data")
    ds.delete(tmp_path / "data", sources=["*a/1*", "*a/2*"])
    bars = sources_of(ds.open(tmp_path / "data"))
    assert [(bar.name[-1], bar.count) for bar in bars] == [("b", 4), ("a", 2)]


def test_a_run_its_checkpoints_and_what_a_step_saw(client: TestClient) -> None:
    shown = text_of(client, "/runs/0")
    assert '<a href="/runs/0/checkpoints/6">' in shown
    assert "sound" in text_of(client, "/runs/0/checkpoints/6?verify=1")
    assert "text: &lt;b&gt;bold" in text_of(client, "/runs/0/steps/2?samples=99")
    assert "no checkpoint knows of this step" in text_of(client, "/runs/0/steps/99", status=404)


def test_lines_of_runs_are_data(client: TestClient) -> None:
    found = client.get("/data/lines", params={"runs": "0", "name": "loss"}).json()
    assert found["lines"][0]["x"] == [1, 2, 3, 4, 5, 6]
    assert client.get("/data/lines", params={"runs": "0", "against": "moon"}).status_code == 400
    assert client.get("/data/lines", params={"runs": "7"}).status_code == 404
    assert client.get("/data/lines", params={"runs": "x"}).status_code == 400


@pytest.mark.parametrize(
    "address", ["/datasets/99", "/runs/99", "/datasets/0/documents/9999/0", "/datasets/0/documents/0/999999"]
)
def test_what_is_not_there_is_said(client: TestClient, address: str) -> None:
    assert "there is no such" in text_of(client, address, status=404)


@pytest.mark.parametrize("query", ["shard=-1", "row=x", "where=nonsense(", "version=77"])
def test_bad_questions_are_answered_with_what_is_wrong(client: TestClient, query: str) -> None:
    assert "This cannot be shown" in client.get(f"{number_of(client, 'tokens')}/documents?{query}").text


def test_nothing_is_written(client: TestClient, ground: Path) -> None:
    before = state_of(ground)
    for address in (
        "/",
        "/runs",
        "/runs/0",
        "/runs/0/steps/1",
        "/runs/0/checkpoints/3?verify=1",
        "/datasets/0",
        "/datasets/0/shards",
        "/datasets/0/documents?q=a",
    ):
        text_of(client, address)
    assert state_of(ground) == before


def state_of(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_damaged_dataset_still_has_a_page(tmp_path: Path) -> None:
    ds.ingest([{"text": "one"}, {"text": "two"}], tmp_path / "data")
    shard = ds.open(tmp_path / "data").segments.shard(0)
    (tmp_path / "data" / shard.path).write_bytes(b"nothing")
    places = Places([str(tmp_path)])
    places.look()
    with TestClient(
        make_app(places, token=TOKEN, hosts=frozenset({HOST})), base_url=f"http://{HOST}", cookies={"datastore": TOKEN}
    ) as client:
        assert "version" in text_of(client, "/datasets/0")
        assert "Restore this file from a copy." in text_of(client, "/datasets/0/documents", status=500)


def test_what_is_named_and_is_nothing_is_said(tmp_path: Path) -> None:
    places = Places([str(tmp_path)])
    places.look()
    assert places.troubles == [f"{tmp_path}: neither a dataset nor a run, nor are there any below it"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    places = Places([str(tmp_path)])
    for run in ("a/first", "b/second"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")
    places.look()
    assert sorted(run.name for run in places.runs) == ["first", "second"]
    (tmp_path / "b" / "first").mkdir()
    (tmp_path / "b" / "first" / "config.json").write_text("{}")
    places.look()
    assert sorted(run.name for run in places.runs) == ["a/first", "b/first", "second"]
