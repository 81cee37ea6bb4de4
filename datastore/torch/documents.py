"""Documents within samples: where each begins, for models whose attention stays within one.

A sample is a stretch of the token stream, so it has the end of one document, some whole ones, and the beginning of another. The
end-of-text token belongs to the document that it ends; what a row begins with counts from its first token. A packed row has whole
documents, and says where they start. Everything is computed on the device that the tokens are on.

Source: the arguments are those of `flash_attn_varlen_func` (flash-attention 2) and `torch.nn.attention.flex_attention`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from datastore.errors import ConfigError

__all__ = ["DocumentLayout", "document_layout"]


@dataclass(frozen=True)
class DocumentLayout:
    """Where documents lie in the rows of a batch, [B, T]."""

    ids: Tensor
    """[B, T] int64: which document of its row each token belongs to, from 0."""

    position_ids: Tensor
    """[B, T] int64: how many tokens of its document come before it in the row."""

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[D + 1] int32: where each document starts in the rows laid end to end, and at last B * T. Waits for the device."""
        starts = torch.nonzero(self.position_ids.flatten() == 0).flatten()
        end = torch.tensor([self.position_ids.numel()], device=starts.device)
        return torch.cat((starts, end)).to(torch.int32)

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest document in any row. Waits for the device."""
        return int(self.position_ids.max()) + 1

    def attention_mask(self) -> Tensor:
        """Return [B, 1, T, T] bool: whether a token (by row) sees another (by column), as `scaled_dot_product_attention` takes it.

        Causal and within the document. It takes B * T * T bytes: for long rows `block_mask` is the better one.
        """
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        return ((self.ids[:, :, None] == self.ids[:, None, :]) & causal)[:, None]

    def block_mask(self) -> BlockMask:
        """Return the same for FlexAttention, which leaves out blocks that nobody sees."""
        ids = self.ids

        def sees(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (ids[batch, query] == ids[batch, key])

        rows, length = ids.shape
        return create_block_mask(sees, rows, None, length, length, device=ids.device)


def document_layout(tokens: Tensor, *, end_of_text: int | None = None, starts: Tensor | None = None) -> DocumentLayout:
    """Return where documents lie in `tokens` [B, T], `TensorBatch.inputs` as a rule.

    `end_of_text` is the token that ends each of them; or, of packed rows, `starts` [D, 2] are the rows and places where
    they begin: `TensorBatch.document_starts`.

    Raises:
        ConfigError: `tokens` are not rows of whole numbers, or it is not said how to tell documents apart.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ConfigError(
            "documents lie in rows of token ids",
            shape=tuple(tokens.shape),
            dtype=str(tokens.dtype),
            hint="Pass [B, T] integers, such as `TensorBatch.inputs`.",
        )
    if (end_of_text is None) == (starts is None):
        raise ConfigError("documents are told apart in one way", hint="Pass either `end_of_text` or `starts`.")
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    if starts is None:
        begins[:, 1:] = tokens[:, :-1] == end_of_text
    else:
        inside = starts[starts[:, 1] < tokens.shape[1]].to(tokens.device)  # The last token is a target alone.
        begins[inside[:, 0], inside[:, 1]] = True
    begins[:, 0] = False  # A row begins with document 0.
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first = torch.where(begins, places, 0).cummax(dim=1).values
    return DocumentLayout(begins.long().cumsum(dim=1), places - first)
