"""Make small data for each recipe of what every Python has: its own sources.

    python docs/recipes/make_data.py [FOLDER]        data/ if it is left out

Everything is a function of the sources: their code, their docstrings, what they import. Only the headlines and pictures are
made up, as no sentence about shares, and no picture, lies in the standard library.
"""

import ast
import io
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import datastore as ds
from datastore.ingestion.settings import IngestSettings

CHAT = """{% for message in messages %}<{{ message.role }}>
{{ message.content }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""
SHAPES = ["circle", "square", "line"]
ITEMS = 128


def sources() -> list[Path]:
    """Return some modules of the standard library."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]


def explained(module: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each function and class that says what it does, and the first line of that."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = (ast.get_docstring(node) or "").splitlines()
            if lines and 10 < len(lines[0]) < 100:
                yield f"{module.stem}.{node.name}", lines[0]


def imported(module: Path) -> list[tuple[str, bool]]:
    """Return what a module imports, in order, and whether by `from`."""
    found = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(one.name.partition(".")[0], False) for one in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module.partition(".")[0], True))
    return found


def texts(folder: Path) -> None:
    """Make a tokenizer, code in two versions, chats and pairs."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    trainer = BpeTrainer(vocab_size=1024, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train([str(one) for one in sources()], trainer)
    tokenizer.save(str(folder / "tok.json"))
    (folder / "chat.jinja").write_text(CHAT)
    code = IngestSettings(tokenizer=str(folder / "tok.json"), workers=1)
    for half in (sources()[::2], sources()[1::2]):
        ds.ingest([str(one) for one in half], str(folder / "code"), settings=code)
    known = [pair for module in sources() for pair in explained(module)]
    others = known[1:] + known[:1]
    with (folder / "chats.jsonl").open("w") as chats, (folder / "pairs.jsonl").open("w") as pairs:
        for number, ((name, text), (_, other)) in enumerate(zip(known, others, strict=True)):
            ask = {"role": "user", "content": f"What is {name}?"}
            chat = {"id": str(number), "messages": [ask, {"role": "assistant", "content": text}]}
            chats.write(json.dumps(chat) + "\n")
            if text != other:
                pair = {"id": str(number), "prompt": ask["content"], "chosen": text, "rejected": other}
                pairs.write(json.dumps(pair) + "\n")
    for take in ("chats", "pairs"):
        made = IngestSettings(
            tokenizer=str(folder / "tok.json"), chat_template=str(folder / "chat.jinja"), take=take, workers=1
        )
        ds.ingest([str(folder / f"{take}.jsonl")], str(folder / take), settings=made)


def records(folder: Path) -> None:
    """Make headlines with a mood, what modules import, and pictures with a word."""
    random = np.random.default_rng(0)
    names = [module.stem for module in sources()]
    up, down = ["rise", "soar", "beat forecasts"], ["fall", "sink", "miss forecasts"]
    with ds.record_writer(str(folder / "headlines"), schema={"text": "string", "label": "string"}) as out:
        for _ in range(600):
            mood = int(random.integers(3))
            what = str(random.choice([up, down, ["are unchanged", "open flat"]][mood]))
            text = f"Shares of {random.choice(names)} {what} as {random.choice(names)} reports"
            out.write({"text": text, "label": ["positive", "negative", "neutral"][mood]})
    ids: dict[str, int] = {}
    sessions = {"id": "string", "items": "list<int64>"}
    clicks = {"module": "string", "item": "string", "length": "double", "clicked": "bool"}
    with (
        ds.record_writer(str(folder / "sessions"), schema=sessions) as out,
        ds.record_writer(str(folder / "clicks"), schema=clicks) as table,
    ):
        for module in sources():
            found = imported(module)
            items = [ids.setdefault(name, len(ids) % ITEMS) for name, _ in found][:25]
            if len(items) > 1:
                out.write({"id": module.stem, "items": items})
            for name, by_from in found:
                table.write({"module": module.stem, "item": name, "length": len(name) / 10, "clicked": by_from})
    with ds.record_writer(str(folder / "pictures"), schema={"image": "binary", "text": "string"}) as out:
        for _ in range(300):
            shape = SHAPES[int(random.integers(3))]
            picture = Image.new("RGB", (32, 32), "white")
            box = [int(one) for one in (*random.integers(2, 8, 2), *random.integers(22, 30, 2))]
            pen = ImageDraw.Draw(picture)
            draw = {"circle": pen.ellipse, "square": pen.rectangle}.get(shape)
            draw(box, fill="black") if draw else pen.line(box, fill="black", width=3)
            raw = io.BytesIO()
            picture.save(raw, "PNG")
            out.write({"image": raw.getvalue(), "text": f"a black {shape}"})


def shape(folder: Path) -> None:
    """Write the config of a small Qwen3, as `transformers` has it."""
    config: dict[str, object] = {"model_type": "qwen3", "vocab_size": 1024, "hidden_size": 64, "head_dim": 32}
    config |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main(folder: Path) -> None:
    """Make all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts(folder)
    records(folder)
    shape(folder / "tiny-qwen3")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
