"""The formats that can be read, by name."""

from typing import Literal, get_args

from datastore.dataset.journal import SourceFormat
from datastore.interop.base import Format
from datastore.interop.columnar import ARROW, HF, PARQUET
from datastore.interop.delimited import CSV, TSV
from datastore.interop.litdata import LITDATA
from datastore.interop.mds import MDS
from datastore.interop.megatron import MEGATRON
from datastore.interop.webdataset import WEBDATASET

__all__ = ["FORMATS", "ImportFormat"]

ImportFormat = Literal["parquet", "arrow", "csv", "tsv", "hf", "mds", "litdata", "megatron", "webdataset"]

FORMATS: dict[str, Format] = {
    "parquet": PARQUET,
    "arrow": ARROW,
    "csv": CSV,
    "tsv": TSV,
    "hf": HF,
    "mds": MDS,
    "litdata": LITDATA,
    "megatron": MEGATRON,
    "webdataset": WEBDATASET,
}

assert get_args(SourceFormat)[6:] == tuple(FORMATS)
