"""The adapter for torch: batches as tensors, datasets for its loaders, documents for its attention.

datasets    TokenDataset, SampleDataset: for DataLoader and the frameworks around it
documents   document_layout: positions, cu_seqlens and masks within samples
batches     stream: batches on the device, for a loop of one's own
"""

from datastore.torch.batches import BUFFERS, MODEL_DIMENSIONS, TensorBatch, TensorStream, rank_of, stream
from datastore.torch.datasets import IGNORED, SampleDataset, TokenDataset
from datastore.torch.documents import DocumentLayout, document_layout

__all__ = [
    "BUFFERS",
    "IGNORED",
    "MODEL_DIMENSIONS",
    "DocumentLayout",
    "SampleDataset",
    "TensorBatch",
    "TensorStream",
    "TokenDataset",
    "document_layout",
    "rank_of",
    "stream",
]
