"""The CPU's fast forms, put where the layers ask: fewer passes over memory, less started work, the same numbers.

They are PyTorch too. What few tokens of a single row take goes further and passes the layers by altogether, see
``few_tokens``.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import gemm
from ..layers.experts import MLP, Experts, Routing, sort_by_expert
from ..layers.norm import RMSNorm
from ..layers.operations import Dispatched
from ..layers.scaled_attention import causal_mask
from ..layers.step import Step
from .chosen import Chosen
from .cpu_attention import MOST_TOKENS, causal_attention, long_attention
from .cpu_experts import experts_one_by_one
from .cpu_norm import rms_norm
from .engine import is_few_tokens
from .few_tokens import FewLink

DTYPES = (torch.float32, torch.float64)  # in 16 bits the plain operations, which widen inside, are as quick
CACHED_VALUES = 2**18  # of an MLP's hidden layer at a time: 1 MiB in FP32


class Cpu(Chosen):
    """Any dtype on a CPU; norms and experts have a form of their own in FP32 and FP64."""

    name = "cpu"
    dtypes = DTYPES
    attention = ("cpu", "up to 1024 tokens in blocks of rows; beyond, torch's fused kernel (AMD, AVX-512: rows)")
    replaces = MappingProxyType(
        {
            RMSNorm: "in few passes over memory",
            MLP: "rows in pieces that fit the processor's cache",
            Experts: "one expert after the other",
        }
    )

    def takes(self, kind: type[nn.Module], x: Tensor) -> bool:
        """A SwiGLU network in any dtype, the others in FP32 and FP64."""
        return kind is MLP or super().takes(kind, x)

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """RMSNorm in few passes."""
        if not self.stands_for(norm, x):
            return norm(x)
        return rms_norm(x, norm.weight, norm.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """In blocks of rows (``cpu_attention``): short causal sequences, and where it is quicker long ones; else fused.

        torch's fused kernel asks for values as wide as the keys, and without them torch would write the whole T x S
        score matrix: zeros fill them up, which cost little beside that.
        """
        n_new, n_total, width = q.shape[2], k.shape[2], v.shape[3]
        causal = mask is None and n_new == n_total
        if causal and n_new <= MOST_TOKENS and q.dtype in DTYPES:
            flat = (x.flatten(0, 1) for x in (q, k, v))
            return causal_attention(*flat, scale).unflatten(0, q.shape[:2])
        if mask is None and n_new > 1 and _long_form_is_quick(q, k, v):
            flat = (x.flatten(0, 1) for x in (q, k, v))
            return long_attention(*flat, scale).unflatten(0, q.shape[:2])
        if mask is None and 1 < n_new < n_total:
            mask = causal_mask(n_new, n_total, q.device)
        if width < k.shape[3]:
            v = F.pad(v, (0, k.shape[3] - width))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return heads[..., :width]

    def feed_forward(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """A few rows at a time: their hidden values stay in the processor's cache."""
        if mlp in self.aside:
            return mlp(x)
        rows = CACHED_VALUES // max(mlp.gate_proj.out_features, 1)
        if x.numel() <= rows * x.shape[-1]:
            return mlp(x)
        return torch.cat([mlp(part) for part in x.flatten(0, -2).split(rows)]).view_as(x)

    def dispatch(self, experts: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Dispatched:
        """Visits sorted by expert; the rows are gathered when their expert's turn comes."""
        if not self.stands_for(experts, x):
            return super().dispatch(experts, x, indices, weights)
        visits = sort_by_expert(indices, experts.gate_up_proj.shape[0])
        return Dispatched(x, indices, weights.to(x.dtype), visits, gathered=False)

    def experts(self, experts: nn.Module, sent: Dispatched) -> Tensor:
        """One expert after the other, answers home included."""
        if not self.stands_for(experts, sent.rows):
            return super().experts(experts, sent)
        return experts_one_by_one(
            sent.rows, sent.weights, experts.gate_up_proj, experts.down_proj, sent.visits, experts.down_recipe.later
        )

    def link(self, module: nn.Module, x: Tensor) -> FewLink | None:
        """The few-token engine that may stand for an MTP module; ``choice`` knows of those of its model."""
        return None

    def advance(
        self, module: nn.Module, hidden: Tensor, embedding: Tensor, step: Step
    ) -> tuple[Tensor, Routing | None] | None:
        """A link of the MTP chain in NumPy, for few tokens of one row."""
        link = self.link(module, hidden) if is_few_tokens(hidden, step) else None
        return None if link is None else link.advance(hidden, embedding, step)


def _long_form_is_quick(*operands: Tensor) -> bool:
    """Where oneDNN makes the products and no gradient is wanted; with torch's BLAS its fused kernel is as quick."""
    return (
        gemm.by_onednn()
        and all(x.dtype is torch.float32 for x in operands)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in operands))
    )
