"""What MLA is measured against: attention that caches whole keys and values, for each head or for a group.

MHA keeps a key and a value for every head, GQA one pair for each group of heads, MQA a single pair for all.
They are one class with another number of key-value heads. Heads are as wide as MLA's (keys with content and
rotary dimensions, values), so that the bytes can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..layers.attention import MultiHeadLatentAttention, Step
from ..layers.cache import LatentCache
from ..layers.rope import RotaryEmbedding, apply_rope

GQA_HEADS = 8
"""Key-value heads of the GQA in the comparison, as many as the usual large open models have."""

_NARROW = 64


class KeyValueCache:
    """The keys and values of one layer, as they are attended to.

    Attributes:
        k: [B, G, S, QK] and v: [B, G, S, V], with G key-value heads; ``None`` while empty.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __len__(self) -> int:
        """Tokens held."""
        return 0 if self.k is None else self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return 0 if self.k is None or self.v is None else self.k.nbytes + self.v.nbytes

    def append(
        self, k: Float[Tensor, "B G T QK"], v: Float[Tensor, "B G T V"]
    ) -> tuple[Float[Tensor, "B G S QK"], Float[Tensor, "B G S V"]]:
        """Store new tokens behind those held and return all."""
        self.k = k if self.k is None else torch.cat([self.k, k], 2)
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        return self.k, self.v


class GroupedQueryAttention(nn.Module):
    """Causal attention whose heads share keys and values in groups.

    o_i = softmax_j(q_i · k_g(i),j / √(d_h + d_h^R)) v_g(i),j, with g(i) = ⌊i · G / n_h⌋.

    Args:
        config: sizes; heads are as wide as MLA's, and the last ``qk_rope_head_dim`` dimensions of a key turn.
        kv_heads: G; ``num_attention_heads`` is MHA, 1 is MQA.

    Raises:
        ConfigError: ``kv_heads`` does not divide the heads.
    """

    def __init__(self, config: ModelConfig, kv_heads: int) -> None:
        super().__init__()
        heads = config.num_attention_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError(f"kv_heads: {kv_heads}, expected a divisor of num_attention_heads ({heads})")
        self.config, self.kv_heads = config, kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * config.qk_head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * config.v_head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        turns: Complex[Tensor, "T half"],
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend to these tokens and, with a cache, to all before them.

        Args:
            x: the tokens. turns: RoPE's turns at their positions. cache: holds what came before, takes these in.
        """
        q, k = (self._turned(project(x), turns) for project in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        repeats = self.config.num_attention_heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        n_new, n_total = q.shape[2], k.shape[2]
        mask = torch.ones(n_new, n_total, dtype=torch.bool, device=x.device).tril(n_total - n_new)
        heads = F.scaled_dot_product_attention(q, k, v, mask, scale=self.config.softmax_scale)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _turned(self, rows: Tensor, turns: Tensor) -> Tensor:
        rows = rows.unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2)
        content, rope = rows.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        return torch.cat([content, apply_rope(rope, turns)], -1)


def cached_layer_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Run one layer of each design over ``tokens`` and read off how many bytes its cache then holds.

    The layers are real and have the configuration's heads; only the hidden size is small, because no cache
    depends on it.

    Args:
        config: sizes. tokens: how many to cache. dtype: of the cached values.

    Returns:
        "MHA", "GQA-8", "MQA", "MLA" → bytes in one layer. GQA is left out where 8 does not divide the heads.
    """
    narrow = config.replace(
        hidden_size=_NARROW, q_lora_rank=None, num_hidden_layers=1, first_k_dense_replace=1
    )
    heads = config.num_attention_heads
    groups = {"MHA": heads, f"GQA-{GQA_HEADS}": GQA_HEADS, "MQA": 1}
    x = torch.zeros(1, tokens, narrow.hidden_size, dtype=dtype)
    turns = RotaryEmbedding(narrow).table(tokens, x)
    found = {}
    with torch.no_grad():
        for name, kv_heads in groups.items():
            if heads % kv_heads == 0:
                cache = KeyValueCache()
                GroupedQueryAttention(narrow, kv_heads).to(dtype)(x, turns, cache)
                found[name] = cache.nbytes
        latents = LatentCache(narrow)
        latents.plan(1, tokens)
        MultiHeadLatentAttention(narrow, layer=0).to(dtype)(x, Step(turns, cache=latents))
        latents.advance(tokens)
        found["MLA"] = latents.nbytes
    return found
