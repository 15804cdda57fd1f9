"""Absorbed decoding over pages: the reference against the model's own attention, and the plan of splits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, configs, randomize

from dsv3lib import ModelConfig
from dsv3lib.errors import KernelError
from dsv3lib.kernels.attention.latent_format import dequantize_latent_ref, quantize_latent
from dsv3lib.kernels.attention.mla_decode import START_PAGES, as_pages, mla_decode, plan_splits
from dsv3lib.kernels.attention.mla_decode_kernels import MOST_SPLITS, PAGE
from dsv3lib.layers.attention import MultiHeadLatentAttention


@settings(max_examples=20)
@given(config=configs(max_layers=1, mtp=0), new=st.integers(1, 4), extra=st.integers(0, 100), seed=SEEDS)
def test_it_is_the_models_absorbed_attention(config: ModelConfig, new: int, extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = MultiHeadLatentAttention(config, 0)
    randomize(layer, generator)
    layer = layer.double()
    heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    total = new + extra
    buffer = torch.full((2, 128, config.latent_dim), float("nan"), dtype=torch.float64)
    buffer[:, :total] = torch.randn(2, total, config.latent_dim, generator=generator, dtype=torch.float64)
    q = torch.randn(2, heads, new, config.qk_head_dim, generator=generator, dtype=torch.float64)
    wanted = layer.absorbed(q, buffer[:, :total])

    w_uk, w_uv = layer.kv_b_proj.weight.unflatten(0, (heads, -1)).split([nope, config.v_head_dim], 1)
    q_BTHL = torch.cat([q[..., :nope] @ w_uk, q[..., nope:]], -1).transpose(1, 2)
    lengths = torch.full((2,), total, dtype=torch.int32)
    u, _ = mla_decode(q_BTHL, *as_pages(buffer), lengths, config.softmax_scale, rank)
    got = torch.einsum("bthc,hvc->bthv", u, w_uv)
    torch.testing.assert_close(got, wanted)


def rows(new: int = 1, total: int = 150) -> tuple[torch.Tensor, ...]:
    buffer = torch.randn(1, 192, 40, dtype=torch.float64)
    q = torch.randn(1, new, 3, 40, dtype=torch.float64)
    return q, *as_pages(buffer), torch.tensor([total], dtype=torch.int32)


def test_lse_joins_parts() -> None:
    """Attention over a whole is its parts' results weighed by exp(lse): what the second kernel does."""
    q, pages, table, lengths = rows(total=128)
    whole, lse = mla_decode(q, pages, table, lengths, 0.2, 32)
    half = torch.tensor([64], dtype=torch.int32)
    (a, lse_a), (b, lse_b) = (mla_decode(q, pages, table[:, i : i + 1], half, 0.2, 32) for i in (0, 1))
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    joined = a * (lse_a - lse).exp()[..., None] + b * (lse_b - lse).exp()[..., None]
    torch.testing.assert_close(joined, whole)
    assert not torch.allclose((a + b) / 2, whole)


def test_new_tokens_do_not_see_those_behind_them() -> None:
    q, pages, table, lengths = rows(new=3, total=70)
    out, lse = mla_decode(q, pages, table, lengths, 0.2, 32)
    for j in range(3):
        one = mla_decode(q[:, j : j + 1], pages, table, lengths - 2 + j, 0.2, 32)
        torch.testing.assert_close(out[:, j : j + 1], one[0])
        torch.testing.assert_close(lse[:, j : j + 1], one[1])


def test_rows_without_tokens_give_zero() -> None:
    q, pages, table, _ = rows(new=3)
    out, lse = mla_decode(q, pages, table, torch.tensor([2], dtype=torch.int32), 0.2, 32)
    assert (out[:, 0] == 0).all() and (lse[:, 0] == float("-inf")).all()
    assert (out[:, 1:] != 0).all() and lse[:, 1:].isfinite().all()


def test_pages_may_lie_anywhere() -> None:
    q, pages, table, lengths = rows()
    wanted = mla_decode(q, pages, table, lengths, 0.2, 32)
    order = torch.tensor([2, 0, 1])
    moved = torch.empty_like(pages)
    moved[order] = pages
    got = mla_decode(q, moved, order.int()[None], lengths, 0.2, 32)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_the_fp8_cache_is_its_values() -> None:
    latents, q = torch.randn(2, PAGE, 128 + 8), torch.randn(2, 1, 4, 128 + 8)
    stored = quantize_latent(latents, 128)
    table, lengths = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([64, 3], dtype=torch.int32)
    got, _ = mla_decode(q, stored, table, lengths, 0.1, 128)
    values = dequantize_latent_ref(stored, 128, torch.float32)
    wanted, _ = mla_decode(q, values, table, lengths, 0.1, 128)
    torch.testing.assert_close(got, wanted)
    plain, _ = mla_decode(q, latents, table, lengths, 0.1, 128)
    assert 1e-4 < (plain - wanted).abs().max() < 0.2


def test_pages_are_a_view() -> None:
    buffer = torch.zeros(2, 128, 40)
    pages, table = as_pages(buffer)
    assert table.tolist() == [[0, 1], [2, 3]]
    buffer[1, 70] = 1
    assert pages[3, 6].eq(1).all() and pages.data_ptr() == buffer.data_ptr()
    with pytest.raises(KernelError, match="reserve 128"):
        as_pages(torch.zeros(2, 100, 40))
    with pytest.raises(KernelError, match="contiguous"):
        as_pages(torch.zeros(2, 40, 128).transpose(1, 2))


@given(programs=st.integers(1, 600), pages=st.integers(0, 3000), slots=st.integers(1, 300))
def test_no_other_number_of_splits_would_be_quicker(programs: int, pages: int, slots: int) -> None:
    splits = plan_splits(programs, pages, slots)
    assert 1 <= splits <= max(1, min(pages, MOST_SPLITS))

    def cost(n: int) -> int:
        return -(-programs * n // slots) * (-(-pages // n) + START_PAGES)

    assert all(cost(splits) <= cost(n) for n in range(1, min(pages, MOST_SPLITS) + 1))


def test_splits_where_they_are_needed() -> None:
    assert plan_splits(programs=2, pages=128, slots=132) > 16  # one sequence on a whole GPU
    assert plan_splits(programs=256, pages=128, slots=132) == 1  # two full rounds as it is
