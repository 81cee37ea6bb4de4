"""Checkpoints of Orbax (jax) as plain trees: what `StandardSave` and `PyTreeSave` write, through the `tensorstore` package.

A folder of Orbax says in `_METADATA` which leaves there are; each lies as a zarr array in one store for all (OCDBT), or in a folder of its own.
What is read: arrays of every kind of number that a step holds, numbers, None, and empty maps and lists; lists and tuples alike become
lists, because Orbax does not keep which they were. What is not: texts, random keys, arrays of types of one's own, and trees in which two leaves have one place
(a key with a dot beside a nested one), of which Orbax itself keeps only one. Each is refused by its name.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from datastore.errors import DependencyError, FormatError

__all__ = ["is_orbax", "read_orbax"]

_TREE = "_METADATA"

_STEP = "_CHECKPOINT_METADATA"

_INDEX = 1
"""What Orbax calls the kind of a key that is a place in a list."""

_ARRAYS = {"jax.Array", "np.ndarray", "scalar"}

_EMPTY: dict[str, Any] = {"None": None, "Dict": {}, "List": [], "Tuple": []}

_BY_BITS = {
    "bfloat16": (torch.uint16, torch.bfloat16),
    "float8_e4m3fn": (torch.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (torch.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2": (torch.uint8, torch.float8_e5m2),
    "float8_e5m2fnuz": (torch.uint8, torch.float8_e5m2fnuz),
    "float8_e8m0fnu": (torch.uint8, torch.float8_e8m0fnu),
}
"""Kinds of numbers that NumPy has not: as what to read them, and what they are."""


def is_orbax(source: Path) -> bool:
    """Return whether the folder is one that Orbax wrote."""
    return (source / _TREE).is_file() or (source / _STEP).is_file()


def read_orbax(source: Path) -> dict[str, Any]:
    """Return the tree in a folder of Orbax; of a step with several items a map of them.

    Raises:
        FormatError: a leaf is of a kind that is not read; its name is in the message.
        DependencyError: `tensorstore` is not installed.
        ValueError: an array is damaged.
    """
    if (source / _TREE).is_file():
        return _tree(source)
    items = {folder.name: folder for folder in sorted(source.iterdir()) if folder.is_dir()}
    found: dict[str, Any] = {name: _tree(folder) for name, folder in items.items() if (folder / _TREE).is_file()}
    for name, folder in items.items():
        if name not in found and (folder / "metadata").is_file():
            found[name] = json.loads((folder / "metadata").read_text(encoding="utf-8"))
    if not found:
        hint = "Name the folder of a step, or of an item in it, that StandardSave or PyTreeSave has written."
        raise FormatError("no item of this step is read", path=str(source), hint=hint)
    return found


def _tree(folder: Path) -> dict[str, Any]:
    described = json.loads((folder / _TREE).read_text(encoding="utf-8"))
    leaves = list(_leaves(described["tree_metadata"]))
    places = [".".join(str(key) for key, _ in path) for path, _ in leaves]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        hint = "Write them to items of their own with Orbax."
        raise FormatError("two leaves have one place, and only one is there", name=twice, path=str(folder), hint=hint)
    root: dict[Any, Any] = {}
    for (path, kind), place in zip(leaves, places, strict=True):
        _put(root, path, _leaf(folder, place, kind, described))
    found: dict[str, Any] = _listed(root)
    return found


def _leaves(described: Mapping[str, Any]) -> Iterator[tuple[list[tuple[Any, bool]], str]]:
    """Yield the path of each leaf, each key with whether it is a place in a list, and what kind of value it is."""
    for leaf in described.values():
        path = [(key["key"], key["key_type"] == _INDEX) for key in leaf["key_metadata"]]
        yield [(int(key) if index else key, index) for key, index in path], leaf["value_metadata"]["value_type"]


def _put(root: dict[Any, Any], path: list[tuple[Any, bool]], value: Any) -> None:
    """Put `value` into maps of maps, in which a list has whole numbers in tuples for keys."""
    for key, index in path[:-1]:
        root = root.setdefault((key,) if index else key, {})
    key, index = path[-1]
    root[(key,) if index else key] = value


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, tuple) for key in value):
        return [_listed(value[key]) for key in sorted(value)]
    return {key: _listed(inner) for key, inner in value.items()}


def _leaf(folder: Path, place: str, kind: str, described: Mapping[str, Any]) -> Any:
    if kind in _EMPTY:
        return type(_EMPTY[kind])() if _EMPTY[kind] is not None else None
    if kind not in _ARRAYS:
        hint = "Leave it out of the tree that Orbax saves, or save it as an array."
        raise FormatError("a leaf of this kind is not read", name=place, kind=kind, path=str(folder), hint=hint)
    tensor = _array(folder, place, described)
    return tensor.item() if kind == "scalar" else tensor


def _array(folder: Path, place: str, described: Mapping[str, Any]) -> torch.Tensor:
    try:
        import tensorstore  # noqa: PLC0415 - only who has such folders needs it
    except ImportError:
        hint = 'Run: pip install "llm-datastore[orbax]"'
        raise DependencyError("checkpoints of Orbax need tensorstore", package="tensorstore", hint=hint) from None
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    store = (
        {"driver": "ocdbt", "base": base, "path": f"{place}/"}
        if described.get("use_ocdbt")
        else {**base, "path": f"{folder.resolve()}/{place}/"}
    )
    driver = "zarr3" if described.get("use_zarr3") else "zarr"
    array = tensorstore.open({"driver": driver, "kvstore": store}, read=True, open=True).result()
    found = array.read().result()
    if array.dtype.name in _BY_BITS:
        plain, dtype = _BY_BITS[array.dtype.name]
        return torch.from_numpy(found.view(str(plain).removeprefix("torch."))).view(dtype)
    try:
        return torch.from_numpy(found)
    except TypeError:
        hint = "Convert it before Orbax saves it."
        raise FormatError("numbers of this kind are not read", name=place, kind=array.dtype.name, hint=hint) from None
