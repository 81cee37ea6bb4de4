"""How each library makes tokens of JSON lines, as its documentation shows it; see `tools/bench/ingest`.

A program gets the folder with `text.jsonl` and `tok.json`, where to write, and how many processes to use. All but datatrove,
which takes `tokenizers` alone, are given gigatoken, so that what is compared is not the encoder. Each ends a document with id 0.
The last line of a program that is asked to `count` is how many tokens it finds in what was written.
"""

__all__ = ["PEERS", "PINS", "PINS_ALONE"]

PINS = ("torch==2.13.0", "numpy==2.4.6", "datasets==5.2.0", "gigatoken==0.10.0", "transformers", "boto3", "orjson", "xxhash", "zstandard",
        "requests", "pillow", "loguru", "rich", "humanize", "dill", "multiprocess", "tqdm", "click")  # fmt: skip
PINS_ALONE = ("megatron-core==0.16.1", "mosaicml-streaming==0.13.0", "litdata==0.2.76", "lightning-utilities==0.15.3",
              "catalogue==2.0.10", "brotli==1.2.1", "python-snappy==0.7.3", "cramjam==2.14.0", "zstd==1.5.7.2",
              "datatrove==0.10.1")  # fmt: skip

HEAD = """
import json, sys
from pathlib import Path

source, target, workers, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), len(sys.argv) > 4

def open_encoder():
    global encode
    from gigatoken.gigatoken_rs import load_hf_json
    encode = load_hf_json(Path(source, "tok.json").read_text()).encode

def spans(parts):
    size = Path(source, "text.jsonl").stat().st_size
    cuts = [size * part // parts for part in range(parts + 1)]
    return list(zip(cuts, cuts[1:]))

def texts(span):
    start, stop = span
    with open(source + "/text.jsonl", "rb") as lines:
        if start:
            lines.seek(start - 1)
            lines.readline()
        while lines.tell() < stop:
            yield json.loads(lines.readline())["text"]
"""

MEGATRON = """
import multiprocessing
import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

def one(line):
    return [*encode(json.loads(line)["text"]), 0]

if __name__ == "__main__":
    if count:
        data = IndexedDataset(target + "/data")
        print(sum(map(int, data.sequence_lengths)))
        sys.exit()
    Path(target).mkdir()
    builder = IndexedDatasetBuilder(target + "/data.bin", dtype=np.uint16)
    with multiprocessing.Pool(workers, initializer=open_encoder) as pool, open(source + "/text.jsonl") as lines:
        for ids in pool.imap(one, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(target + "/data.idx")
"""

LITDATA = """
import numpy as np
import torch
from litdata import optimize
from litdata.streaming.item_loader import TokensLoader

def tokenize(span):
    if "encode" not in globals():
        open_encoder()
    for text in texts(span):
        yield torch.from_numpy(np.append(encode(text), 0).astype(np.uint16))

if __name__ == "__main__":
    if count:
        print(sum(chunk["dim"] for chunk in json.loads(Path(target, "index.json").read_text())["chunks"]))
        sys.exit()
    optimize(fn=tokenize, inputs=spans(8), output_dir=target, chunk_bytes="64MB", item_loader=TokensLoader(), num_workers=workers)
"""

MDS = """
import types
import numpy as np
import transformers.feature_extraction_utils
for name in ("", ".datasets", ".transforms", ".transforms.functional"):
    import importlib.machinery
    stub = types.ModuleType("torchvision" + name)
    stub.__spec__ = importlib.machinery.ModuleSpec(stub.__name__, None)
    sys.modules[stub.__name__] = stub
sys.modules["torchvision.datasets"].VisionDataset = object
sys.modules["torchvision.transforms.functional"].to_tensor = None
import multiprocessing
from streaming import MDSWriter
from streaming.base.util import merge_index

def work(job):
    number, span = job
    open_encoder()
    with MDSWriter(out=f"{target}/{number}", columns={"tokens": "ndarray:uint16"}) as out:
        for text in texts(span):
            out.write({"tokens": np.append(encode(text), 0).astype(np.uint16)})

if __name__ == "__main__":
    if count:
        from streaming import StreamingDataset
        print(sum(len(row["tokens"]) for row in StreamingDataset(local=target, batch_size=1)))
        sys.exit()
    with multiprocessing.Pool(workers) as pool:
        pool.map(work, enumerate(spans(workers)))
    merge_index(target, keep_local=True)
"""

DATASETS = """
import datasets
import numpy as np

datasets.disable_progress_bars()

def tokenize(batch):
    if "encode" not in globals():
        open_encoder()
    return {"ids": [np.append(encode(text), 0).astype(np.uint16) for text in batch["text"]]}

if __name__ == "__main__":
    if count:
        print(sum(map(len, datasets.load_from_disk(target)["ids"])))
        sys.exit()
    data = datasets.load_dataset("json", data_files=source + "/text.jsonl", split="train", cache_dir=target + "/cache")
    data = data.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    data.save_to_disk(target)
"""

DATATROVE = """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    if count:
        print(sum(path.stat().st_size for path in Path(target).glob("*.ds")) // 2)
        sys.exit()
    steps = [
        JsonlReader(source + "/parts"),
        DocumentTokenizer(target, tokenizer_name_or_path=source + "/tok.json", eos_token="<|endoftext|>", shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=workers, workers=workers, logging_dir=target + "/logs").run()
"""

PEERS = {
    "Megatron's builder": HEAD + MEGATRON,
    "litdata.optimize": HEAD + LITDATA,
    "MDSWriter": HEAD + MDS,
    "datasets.map": HEAD + DATASETS,
    "datatrove, tokenizers": HEAD + DATATROVE,
}
"""By name, the program."""
