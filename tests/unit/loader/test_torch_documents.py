"""Documents within rows: attention with any of the masks is attention within each document by itself."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from datastore.errors import ConfigError
from datastore.loader.loader import Loader
from datastore.testing.examples import make_dataset
from datastore.torch import document_layout, stream

END = 9
ROWS = torch.tensor([[1, 2, END, 3, END, END, 4, 5], [1, 1, 1, 1, 1, 1, 1, 1], [END, 1, 2, 3, 4, 5, 6, END]])


def documents(row: list[int]) -> list[list[int]]:
    """Return the places of each document in a row, written down without any of the code above."""
    found: list[list[int]] = [[]]
    for place, token in enumerate(row):
        found[-1].append(place)
        if token == END:
            found.append([])
    return [one for one in found if one]


def test_positions_and_lengths_are_those_of_the_documents() -> None:
    layout = document_layout(ROWS, end_of_text=END)
    assert layout.ids.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 1]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [*range(8)], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 16, 17, 24]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 8


@given(st.lists(st.lists(st.integers(0, END), min_size=12, max_size=12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_rows_are_laid_out_as_their_documents_are(rows: list[list[int]]) -> None:
    layout = document_layout(torch.tensor(rows), end_of_text=END)
    lengths = [len(one) for row in rows for one in documents(row)]
    assert torch.diff(layout.cu_seqlens).tolist() == lengths
    assert layout.max_seqlen == max(lengths)
    for row, ids, positions in zip(rows, layout.ids.tolist(), layout.position_ids.tolist(), strict=True):
        for number, places in enumerate(documents(row)):
            assert [ids[place] for place in places] == [number] * len(places)
            assert [positions[place] for place in places] == [*range(len(places))]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_masked_attention_is_that_of_each_document_alone() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 8, 16) for _ in range(3))
    layout = document_layout(ROWS, end_of_text=END)
    wanted = torch.empty_like(query)
    for row, tokens in enumerate(ROWS.tolist()):
        for places in documents(tokens):
            part = [one[row : row + 1, :, places] for one in (query, key, value)]
            wanted[row, :, places] = scaled_dot_product_attention(*part, is_causal=True)[0]
    dense = scaled_dot_product_attention(query, key, value, attn_mask=layout.attention_mask())
    assert torch.allclose(dense, wanted, atol=1e-6)
    sparse: Tensor = flex_attention(query, key, value, block_mask=layout.block_mask())
    assert torch.allclose(sparse, wanted, atol=1e-6)


def test_it_takes_the_batches_of_a_loader(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", [[50, 7, 90]], block_bytes=4096)
    batch = next(stream(Loader(dataset, seq_len=16, global_batch=4)))
    layout = document_layout(batch.inputs, end_of_text=int(batch.inputs[0, 3]))
    assert layout.position_ids[0, 4] == 0
    assert layout.ids.shape == batch.inputs.shape
    assert int(layout.cu_seqlens[-1]) == batch.inputs.numel()


@pytest.mark.parametrize("tokens", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)])
def test_what_is_no_row_of_tokens_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match="rows of token ids"):
        document_layout(tokens, end_of_text=0)
