"""Other libraries, as the tests of interoperation use them.

Some cannot be installed with all that they ask for (`tools/peers.txt` says which and why); their tests are skipped where they are
missing.
"""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest


def mosaicml() -> Any:
    """Return `streaming`. It imports torchvision for its image classes, which nothing here uses."""
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed (tools/peers.txt)")
    if "streaming" not in sys.modules:
        pytest.importorskip("transformers.feature_extraction_utils")  # It looks for torchvision, too, and first.
        names = ["", ".datasets", ".transforms", ".transforms.functional"]
        stubs = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
        for name, stub in stubs.items():
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stubs["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        stubs["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            for name, stub in stubs.items():
                patch.setitem(sys.modules, name, stub)
            import streaming  # noqa: F401 - with the stubs in place
    return sys.modules["streaming"]


def litdata() -> Any:
    """Return `litdata`."""
    return pytest.importorskip("litdata", reason="litdata is not installed (tools/peers.txt)")


def indexed_dataset() -> Any:
    """Return Megatron's module of indexed datasets."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core (tools/peers.txt)")
