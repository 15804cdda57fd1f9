"""How many parameters a model has, by part."""

from __future__ import annotations

from torch import nn

from ..config import ModelConfig

PARTS = (
    "embedding", "head", "attention", "dense", "shared_experts", "routed_experts", "router", "norms", "mtp",
)  # fmt: skip


def parameter_counts(model: nn.Module, config: ModelConfig) -> dict[str, int]:
    """Parameters by part; works on the meta device.

    Args:
        model: a ``DeepSeekV3``.
        config: its sizes.

    Returns:
        "embedding", "head", "attention", "dense", "shared_experts", "routed_experts", "router" (with its
        biases), "norms", "mtp" (all that the MTP modules own), "main" (all but "mtp"), "active" (main
        parameters that one token meets: of the routed experts K_r, of the embedding nothing, but where it is the
        head too).
    """
    counts = dict.fromkeys(PARTS, 0)
    tensors = dict(model.named_parameters())
    tensors |= {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    for name, tensor in tensors.items():
        counts[_part_of(name, config.num_hidden_layers)] += tensor.numel()
    counts["main"] = sum(counts.values()) - counts["mtp"]
    idle = round(counts["routed_experts"] * (1 - config.num_experts_per_tok / config.n_routed_experts))
    looked_up = 0 if config.tie_word_embeddings else counts["embedding"]
    counts["active"] = counts["main"] - looked_up - idle
    return counts


def _part_of(name: str, n_main: int) -> str:
    """To which part of the model a parameter belongs."""
    pieces = name.split(".")
    if pieces[1] == "layers" and int(pieces[2]) >= n_main:
        return "mtp"
    if name.endswith("norm.weight"):
        return "norms"
    for piece, part in (
        ("embed_tokens", "embedding"), ("lm_head", "head"), ("self_attn", "attention"), ("gate", "router"),
        ("shared_experts", "shared_experts"), ("experts", "routed_experts"),
    ):  # fmt: skip
        if piece in pieces:
            return part
    return "dense"
