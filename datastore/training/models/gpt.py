"""A GPT to read: rotary positions, RMSNorm, SwiGLU, grouped-query attention, tied or untied embeddings.

Modules, parameter names and shapes are those of Hugging Face's Llama. The price is a few names one would not choose;
for it, export is a config file and a plain copy of the tensors, and import is the same the other way round.

Legend: B batch, T tokens, V vocabulary, C width, H heads, K heads of keys and values, D width of a head.

Source: J. Su et al., "RoFormer", arXiv:2104.09864 (rotary positions, in the half-split form of Llama); B. Zhang and
R. Sennrich, arXiv:1910.07467 (RMSNorm); N. Shazeer, arXiv:2002.05202 (SwiGLU); J. Ainslie et al., arXiv:2305.13245
(grouped queries); A. Radford et al., GPT-2 (residual projections start smaller by sqrt(2 x layers)).
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from datastore.training.models.cache import KeyValueCache
from datastore.training.settings import ModelSettings

__all__ = ["GPT", "Attention", "Block", "Decoder", "Shared", "begins_at", "draw_weights", "parameter_count", "turns_of"]

_INIT_STD = 0.02

_CHUNK_VALUES = 2**24
"""How many logits are there at once, where they are made some rows at a time: 64 MiB of float32."""


class Shared(Protocol):
    """A sequence of which other ranks have some tokens."""

    @property
    def place(self) -> int:
        """How many runs of as many tokens come before those that are here."""
        ...

    def gather(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values of these tokens and all before them, and a mask [T, all] of what each sees; None: up to its own."""
        ...


class Attention(nn.Module):
    """Attention in which several query heads share one head of keys and values."""

    def __init__(self, settings: ModelSettings, layer: int, *, causal: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.causal = causal
        self.heads, self.key_heads = settings.heads, settings.key_heads
        self.head_width = settings.head_size
        self.q_proj = nn.Linear(settings.width, self.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(settings.width, self.key_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(settings.width, self.key_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_width, settings.width, bias=False)
        self.shared: Shared | None = None
        """Who has the tokens before, where ranks share a sequence."""

    def forward(self, x_BTC: Tensor, turns: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        """Return what each token gathers from itself and the tokens before it, or from all of them, [B, T, C]."""
        batch, tokens, _ = x_BTC.shape
        # -1: as many heads as are here, which is a part of them under tensor parallelism.
        q_BHTD = self.q_proj(x_BTC).view(batch, tokens, -1, self.head_width).transpose(1, 2)
        k_BKTD = self.k_proj(x_BTC).view(batch, tokens, -1, self.head_width).transpose(1, 2)
        v_BKTD = self.v_proj(x_BTC).view(batch, tokens, -1, self.head_width).transpose(1, 2)
        q_BHTD, k_BKTD = _rotate(q_BHTD, turns), _rotate(k_BKTD, turns)
        if cache is not None:
            k_BKTD, v_BKTD = cache.extend(self.layer, k_BKTD, v_BKTD)
        seen = None
        if self.shared is not None:
            k_BKTD, v_BKTD, seen = self.shared.gather(k_BKTD, v_BKTD)
        if self.key_heads != self.heads:
            # enable_gqa=True is up to 3.7x slower on CPU (float32, B=8, T=256, H=8, K=2; torch 2.13, two cores).
            k_BKTD = k_BKTD.repeat_interleave(self.heads // self.key_heads, dim=1)
            v_BKTD = v_BKTD.repeat_interleave(self.heads // self.key_heads, dim=1)
        mixed_BHTD = functional.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD, attn_mask=seen, is_causal=self.causal and seen is None and tokens > 1
        )
        return self.o_proj(mixed_BHTD.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(settings.width, settings.inner_width, bias=False)
        self.up_proj = nn.Linear(settings.width, settings.inner_width, bias=False)
        self.down_proj = nn.Linear(settings.inner_width, settings.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return what each token adds to itself, [B, T, C]."""
        return self.down_proj(functional.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: tokens exchange, then each thinks by itself; both add to the residual stream."""

    def __init__(self, settings: ModelSettings, layer: int, *, causal: bool = True) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(settings.width, eps=settings.norm_eps)
        self.self_attn = Attention(settings, layer, causal=causal)
        self.post_attention_layernorm = nn.RMSNorm(settings.width, eps=settings.norm_eps)
        self.mlp = MLP(settings)
        self.recompute = False
        """Whether only the input is kept for the backward pass, which computes the rest again."""

    def forward(self, x_BTC: Tensor, turns: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        """Return the residual stream behind this layer, [B, T, C]."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._add, x_BTC, turns, cache, use_reentrant=False)  # type: ignore[no-any-return]
        return self._add(x_BTC, turns, cache)

    def _add(self, x_BTC: Tensor, turns: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), turns, cache)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, settings: ModelSettings, *, causal: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.width)
        self.layers = nn.ModuleList(Block(settings, layer, causal=causal) for layer in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width, eps=settings.norm_eps)

    def forward(
        self,
        ids_BT: Tensor,
        turns: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
        before_BPC: Tensor | None = None,
    ) -> Tensor:
        """Return the final state of each token, [B, T, C], behind those of what comes before the text."""
        x_BTC = self.embed_tokens(ids_BT)
        if before_BPC is not None:
            x_BTC = torch.cat((before_BPC.to(x_BTC.dtype), x_BTC), dim=1)
        for block in self.layers:
            x_BTC = block(x_BTC, turns, cache)
        return self.norm(x_BTC)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A language model; `settings.vocab_size` must be set. With `causal` false each token sees those after it, too."""

    def __init__(self, settings: ModelSettings, *, causal: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.causal = causal
        self.model = Decoder(settings, causal=causal)
        self.lm_head = None if settings.tied else nn.Linear(settings.width, settings.vocab_size, bias=False)
        self.shared: Shared | None = None
        """Who has the tokens before, where ranks share a sequence."""

    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights anew; the same generator gives the same weights."""
        draw_weights(self, generator, layers=self.settings.layers)

    def forward(
        self,
        ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        *,
        before_BPC: Tensor | None = None,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of each next token, [B, T, V]. With a `cache`, feed the prompt first, then one token at a time.

        `before` stands in front of the text, and has logits, too. With `targets` return the sum of their cross-entropy instead, -100
        counting nothing: then there are never more than some rows of the logits.
        """
        places = ids_BT.shape[1] + (0 if before_BPC is None else before_BPC.shape[1])
        start = begins_at(self.shared, places) if cache is None else cache.length
        turns = turns_of(self.settings, start, places, ids_BT.device)
        x_BTC = self.model(ids_BT, turns, cache, before_BPC)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        if targets_BT is not None and _is_plain(head):
            return _summed_loss(x_BTC, getattr(head, "used_weight", head.weight), targets_BT)
        if self.lm_head is None:
            logits_BTV = functional.linear(x_BTC, getattr(head, "used_weight", head.weight))
        else:
            logits_BTV = self.lm_head(x_BTC)
        if targets_BT is None:
            return logits_BTV
        return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")


def _is_plain(head: nn.Module) -> bool:
    """Return whether the output layer is a matrix and no more: no hook has replaced it or looks at what goes in."""
    watched = bool(head._forward_hooks or head._forward_pre_hooks)  # noqa: SLF001 - torch has no other way to ask
    return (type(head) in {nn.Linear, nn.Embedding} or hasattr(head, "used_weight")) and not watched


def _summed_loss(x_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the sum of the cross-entropy of logits that are made some rows at a time, in float32.

    In bfloat16 torch 2.13 returns a sum that is 3 % too low (`findings/torch_chunked_cross_entropy_is_low_in_bf16.sh`).
    """
    inputs, targets = x_BTC.flatten(0, 1).float(), targets_BT.flatten()
    # Its own choice of rows is 35 times as slow for a narrow model with a large vocabulary (torch 2.13, CPU).
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(64, _CHUNK_VALUES // len(weight_VC)))
    return functional.linear_cross_entropy(inputs, weight_VC.float(), targets, reduction="sum", options=options)


def draw_weights(model: nn.Module, generator: torch.Generator, *, layers: int) -> None:
    """Draw all weights anew: norms are 1, biases 0, matrices normal, those at the end of a residual branch smaller."""
    residual_std = _INIT_STD / (2 * layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() < 2:
            nn.init.ones_(parameter)
        else:
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
            nn.init.normal_(parameter, std=std, generator=generator)


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable values; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def begins_at(shared: Shared | None, tokens: int) -> int:
    """Return how many tokens of the sequence come before the `tokens` that are here."""
    return 0 if shared is None else shared.place * tokens


def turns_of(settings: ModelSettings, start: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [T, D] of the angle by which each pair of channels turns at each position."""
    half = torch.arange(0, settings.head_size, 2, dtype=torch.float32, device=device)
    speeds = settings.rope_theta ** (-half / settings.head_size)
    angles = torch.outer(torch.arange(start, start + tokens, dtype=torch.float32, device=device), speeds)
    angles_TD = torch.cat((angles, angles), dim=-1)
    return angles_TD.cos(), angles_TD.sin()


def _rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of [B, heads, T, D]."""
    cosine, sine = turns[0].to(x.dtype), turns[1].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
