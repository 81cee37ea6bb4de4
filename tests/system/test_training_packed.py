"""A run on packed rows: resumed on other ranks it is the same run, and each step is traced to the documents it saw."""

from pathlib import Path

import pytest

from datastore.testing.examples import make_language, tiny_settings
from datastore.training.run.audit import trace
from datastore.training.run.proof import prove
from datastore.training.start import resume, train


@pytest.mark.parametrize("packing", ["best_fit", "buckets"])
def test_a_packed_run_is_resumed_proven_and_traced(tmp_path: Path, packing: str) -> None:
    make_language(tmp_path / "data")
    settings = tiny_settings(tmp_path / "data", f"loader.packing={packing}", "train.steps=10")
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    train(settings, whole)
    train(tiny_settings(tmp_path / "data", f"loader.packing={packing}", "train.steps=5"), cut)
    resume(cut, overrides=["train.steps=10"], processes=2)
    for run in (whole, cut):
        proof = prove(run)
        assert proof.holds, proof.problems
        assert proof.samples == proof.distinct == 120
    steps = [(trace(whole, step).fingerprint, trace(cut, step).fingerprint) for step in (1, 6, 10)]
    assert all(one == other for one, other in steps)
    for sample in trace(whole, 7).samples:
        assert sum(span.tokens for span in sample.spans) <= 33
        # The token that ends a document has no text.
        assert all(span.tokens - len(span.text.split()) in (0, 1) for span in sample.spans)
