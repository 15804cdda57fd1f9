"""The same blocks for a single token on a CPU, in as few operations as it takes.

When one row continues by one token, each matrix is read once and the vectors are tiny: what costs is not
arithmetic but *starting* operations, 2 to 10 µs each, some 200 of them in a layer of the plain form. Here a
token is a plain vector, a linear layer one matrix-vector product, a norm three operations instead of a dozen,
the choice of experts Python on a handful of numbers, and nothing is sorted or sent about. The plain layers
beside this file are the definition; a test holds both equal.

Differs from the plain form: no gradient is kept, and forward hooks on the layers do not fire.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import InputError
from .attention import Step, absorbed_is_cheaper
from .block import Block
from .experts import MixtureOfExperts, Routing
from .norm import RMSNorm

Parts = dict[str, nn.Module]


def applies(x: Float[Tensor, "B T D"], step: Step, config: ModelConfig) -> bool:
    """Whether this file can take a call: inference, on the CPU, one row, one token, with a cache."""
    return (
        x.shape[0] == x.shape[1] == 1
        and step.cache is not None
        and step.lengths is None
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and config.qk_nope_head_dim % 2 == 0  # pairs lie on even addresses
        and config.kv_lora_rank % 2 == 0
        and absorbed_is_cheaper(config, 1, len(step.cache) + 1)
    )


class OneToken:
    """What a token needs on its way through all layers.

    Args:
        config: sizes. step: the call's cache and turns. like: a tensor of the dtype to use.
    """

    def __init__(self, config: ModelConfig, step: Step, like: Tensor) -> None:
        self.config, self.cache = config, step.cache
        self.turn: Complex[Tensor, " half"] = step.turns[0]
        # x·w·factor is one operation where the sum begins at a tensor: these.
        widths = {config.hidden_size, config.kv_lora_rank, config.q_lora_rank or config.hidden_size}
        self.zeros = {n: like.new_zeros(n) for n in widths}

    def forward(
        self, blocks: Iterable[Block], norm: RMSNorm, x: Float[Tensor, "1 1 D"]
    ) -> tuple[Float[Tensor, "1 1 D"], list[Routing]]:
        """All blocks, x + MLA(norm x) and x + FFN(norm x), and the last norm; and how mixtures routed.

        Args:
            blocks: the layers, from the first. norm: behind the last. x: the token's embedding.
        """
        x, choices, affinities = x.view(-1), [], []
        for layer, block in enumerate(blocks):
            parts = (
                block._modules
            )  # the dictionary: attribute look-up on a module costs as much as an addition
            h = self.normalize(parts["input_layernorm"], x)
            x = self.attend(parts["self_attn"]._modules, layer, x, h)
            h = self.normalize(parts["post_attention_layernorm"], x)
            if isinstance(parts["mlp"], MixtureOfExperts):
                x, chosen, scores = self.add_mixture(parts["mlp"]._modules, x, h)
                choices.append(chosen)
                affinities.append(scores)
            else:
                x = add_mlp(parts["mlp"]._modules, x, h)
        indices = torch.tensor(choices, dtype=torch.int64)[:, None, None]
        routings = [Routing(i, s.view(1, 1, -1)) for i, s in zip(indices, affinities, strict=True)]
        return self.normalize(norm, x).view(1, 1, -1), routings

    def normalize(self, norm: nn.Module, x: Float[Tensor, " D"], factor: float = 1.0) -> Float[Tensor, " D"]:
        """RMSNorm, times ``factor``: the root of the mean square is one Python number."""
        n = x.shape[0]
        scale = factor / math.sqrt(torch.dot(x, x).item() / n + norm.eps)
        return torch.addcmul(self.zeros[n], x, weight(norm), value=scale)

    def attend(
        self, parts: Parts, layer: int, x: Float[Tensor, " D"], h: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """x + absorbed attention of one query per head; the new latent is stored first.

        The softmax scale rides in the query latent's norm: from there to the scores everything is linear.
        """
        cfg = self.config
        heads, nope, rank = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank

        latent = linear(parts["kv_a_proj_with_mqa"], h)
        self.turn_(latent, rank)
        c_kv = latent[:rank]
        c_kv.copy_(self.normalize(parts["kv_a_layernorm"], c_kv))
        past = self.cache.append(layer, latent.view(1, 1, -1))[0]  # [S, C + R]

        if cfg.q_lora_rank is None:
            q = linear(parts["q_proj"], h).mul_(cfg.softmax_scale)
        else:
            c_q = self.normalize(parts["q_a_layernorm"], linear(parts["q_a_proj"], h), cfg.softmax_scale)
            q = linear(parts["q_b_proj"], c_q)
        q = q.view(heads, 1, -1)
        self.turn_(q, nope)

        w = weight(parts["kv_b_proj"]).view(heads, -1, rank)  # [H, K + V, C]
        q_latent = torch.bmm(q[..., :nope], w[:, :nope])
        q_latent = torch.cat((q_latent, q[..., nope:]), -1).view(heads, -1)
        p = torch.softmax(torch.mm(q_latent, past.t()), -1)
        u = torch.mm(p, past[:, :rank]).view(heads, 1, rank)
        return add_linear(x, parts["o_proj"], torch.bmm(u, w[:, nope:].transpose(1, 2)).view(-1))

    def turn_(self, x: Float[Tensor, "*H QK"], start: int) -> None:
        """RoPE in place on the dimensions from ``start``: neighbours are pairs, one complex product each."""
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        pairs[..., start // 2 :].mul_(self.turn)

    def add_mixture(
        self, parts: Parts, x: Float[Tensor, " D"], h: Float[Tensor, " D"]
    ) -> tuple[Float[Tensor, " D"], list[int], Float[Tensor, " E"]]:
        """x + the shared expert + the chosen ones, each weighted (Eq. 12); no other weights are touched."""
        gate, experts = parts["gate"], parts["experts"]._parameters
        scores = torch.mv(weight(gate), h).sigmoid_()
        chosen, gates = route_one(scores.tolist(), gate.e_score_correction_bias.tolist(), self.config)
        x = add_mlp(parts["shared_experts"]._modules, x, h)

        w_in, w_out = experts["gate_up_proj"], experts["down_proj"]
        width = self.config.moe_intermediate_size
        gate_up = h.new_empty(len(chosen), 2 * width)
        for i, row in zip(chosen, gate_up.unbind(), strict=True):
            torch.mv(w_in[i], h, out=row)
        hidden = F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
        for i, g, row in zip(chosen, gates, hidden.unbind(), strict=True):
            x.addmv_(w_out[i], row, alpha=g)
        return x, chosen, scores


def weight(layer: nn.Module) -> Tensor:
    """A layer's weight, without the detour of attribute look-up."""
    return layer._parameters["weight"]


def linear(layer: nn.Module, x: Float[Tensor, " I"]) -> Float[Tensor, " O"]:
    """W x, plus the bias where there is one."""
    bias = layer._parameters["bias"]
    return torch.mv(weight(layer), x) if bias is None else torch.addmv(bias, weight(layer), x)


def add_linear(x: Float[Tensor, " O"], layer: nn.Module, h: Float[Tensor, " I"]) -> Float[Tensor, " O"]:
    """x + W h in one operation: the residual connection rides along."""
    y, bias = torch.addmv(x, weight(layer), h), layer._parameters["bias"]
    return y if bias is None else y.add_(bias)


def add_mlp(parts: Parts, x: Float[Tensor, " D"], h: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """x + down(silu(gate h) ⊙ up h)."""
    a = F.silu(torch.mv(weight(parts["gate_proj"]), h), inplace=True)
    a.mul_(torch.mv(weight(parts["up_proj"]), h))
    return torch.addmv(x, weight(parts["down_proj"]), a)


def route_one(
    scores: Sequence[float], bias: Sequence[float], config: ModelConfig
) -> tuple[list[int], list[float]]:
    """``router.route`` for one token in plain Python, which is quicker than tensors for a row of this length.

    Args:
        scores: sigmoid affinities s. bias: b.

    Returns:
        The experts, best first (the lower index among equals), and their gate values.

    Raises:
        InputError: a score is NaN.
    """
    if math.isnan(sum(scores)):
        raise InputError(
            f"scores: {sum(map(math.isnan, scores))} of {len(scores)} are NaN, expected affinities in [0, 1]; "
            "the hidden state or the router's weight is spoilt"
        )
    steered = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = range(len(steered))
    if config.n_group > 1:
        size = len(steered) // config.n_group
        starts = range(0, len(steered), size)
        totals = {start: sum(sorted(steered[start : start + size])[-2:]) for start in starts}
        kept = sorted(sorted(starts, key=totals.__getitem__, reverse=True)[: config.topk_group])
        allowed = [i for start in kept for i in range(start, start + size)]
    chosen = sorted(allowed, key=steered.__getitem__, reverse=True)[: config.num_experts_per_tok]
    total = sum(scores[i] for i in chosen) + 1e-20 if config.norm_topk_prob else 1.0
    return chosen, [scores[i] / total * config.routed_scaling_factor for i in chosen]
