"""Random small models for hypothesis, and the proof that a check can fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, ModelConfig, YarnScaling

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def configs(
    draw: st.DrawFn,
    yarn: bool | None = None,
    mtp: int | tuple[int, int] = (0, 2),
    oracle: bool = False,
    max_layers: int = 3,
    **fixed: Any,
) -> ModelConfig:
    """A small configuration of any shape that V3's rules allow.

    Args:
        yarn: on, off, or drawn. mtp: depth of the MTP chain, or its bounds. oracle: only what transformers
            computes alike (its latent norms always use ε = 1e-6). fixed: fields that are not drawn.
    """
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    per_group = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    layers = draw(st.integers(1, max_layers))
    depths = (mtp, mtp) if isinstance(mtp, int) else mtp
    scaling = None
    longest = 256
    if draw(st.booleans()) if yarn is None else yarn:
        factor = draw(st.sampled_from([2.0, 4.0, 10.0, 40.0]))
        original = draw(st.sampled_from([64, 128, 512]))
        scaling = YarnScaling(
            factor, original, beta_fast=draw(st.sampled_from([4.0, 32.0])), beta_slow=1.0,
            mscale=draw(st.sampled_from([0.7, 1.0])), mscale_all_dim=draw(st.sampled_from([0.5, 1.0])),
        )  # fmt: skip
        longest = min(longest, int(factor * original))
    fields = {
        "vocab_size": draw(st.integers(11, 60)),
        "hidden_size": draw(st.integers(2, 8)) * 4,
        "intermediate_size": draw(st.integers(3, 40)),
        "moe_intermediate_size": draw(st.integers(2, 20)),
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.integers(1, 4)),
        "kv_lora_rank": draw(st.integers(2, 20)),
        "q_lora_rank": draw(st.none() | st.integers(2, 20)),
        "qk_nope_head_dim": draw(st.integers(1, 10)),
        "qk_rope_head_dim": draw(st.integers(1, 5)) * 2,
        "v_head_dim": draw(st.integers(1, 20)),
        "n_routed_experts": groups * per_group,
        "num_experts_per_tok": draw(st.integers(1, min(kept * per_group, 4))),
        "n_shared_experts": draw(st.integers(1, 2)),
        "n_group": groups,
        "topk_group": kept,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_nextn_predict_layers": draw(st.integers(*depths)),
        "max_position_embeddings": longest,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "norm_topk_prob": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "rope_scaling": scaling,
        "rope_interleave": draw(st.booleans()),
        "rms_norm_eps": 1e-6 if oracle else draw(st.sampled_from([1e-6, 1e-3])),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return ModelConfig(**(fields | fixed))


def small(**changes: Any) -> ModelConfig:
    """One fixed small configuration that has every part: groups, a dense layer, both latents, one MTP module."""
    fields = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 3, "kv_lora_rank": 12, "q_lora_rank": 10,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def build(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> DeepSeekV3:
    """A model whose every weight matters: matrices that carry signal, norms off one, biases of both signs."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepSeekV3(config, generator=generator, **settings)
    randomize(model, generator)
    return model.to(dtype)


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill a model, ours or transformers', with weights at which every part has a say in the result."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, 1.0, generator=generator)
        else:
            parameter.normal_(0.0, max(parameter.shape[-1], 1) ** -0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # mostly below -1: biased scores on both sides of zero
            buffer.uniform_(-1.5, 0.3, generator=generator)


def tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def assert_rejects(check: Callable[..., None], examples: int = 50, **strategies: st.SearchStrategy) -> None:
    """Assert that a check which accepts the right implementation fails on this wrong one.

    A test that cannot fail proves nothing; each property is therefore shown a deliberately wrong twin.
    """

    @settings(
        max_examples=examples, phases=[Phase.generate], report_multiple_bugs=False, deadline=None,
        suppress_health_check=list(HealthCheck), derandomize=True, database=None,
    )  # fmt: skip
    @given(**strategies)
    def search(**drawn: Any) -> None:
        check(**drawn)

    with pytest.raises(AssertionError):
        search()


@contextmanager
def unchecked() -> Iterator[None]:
    """Annotations unchecked, as they are for a user, whose bad input meets the library's own errors first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
