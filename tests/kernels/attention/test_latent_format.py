"""The FP8 form of a cached latent: its bytes, its error, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.attention.latent_format import (
    dequantize_latent,
    quantize_latent,
    quantize_latent_ref,
    split_stored,
    stored_bytes,
)

HALF_STEP = 2.0**-4  # of E4M3's three mantissa bits, relative to the value
SMALLEST = 2.0**-10  # half of its smallest step


def test_v3_stores_656_bytes() -> None:
    assert stored_bytes(512, 64) == 656
    assert stored_bytes(512, 64) / (2 * (512 + 64)) == pytest.approx(0.569, abs=1e-3)


@given(
    tokens=st.integers(0, 5),
    tiles=st.integers(1, 4),
    short=st.sampled_from([0, 4, 64, 96]),
    power_of_two=st.booleans(),
    half=st.integers(1, 8),
    size=st.integers(-20, 20),
    seed=SEEDS,
)
def test_it_comes_back_within_half_a_step(
    tokens: int, tiles: int, short: int, half: int, size: int, power_of_two: bool, seed: int
) -> None:
    rank = 128 * tiles - short
    x = torch.randn(2, tokens, rank + 2 * half, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    stored = quantize_latent(x, rank, power_of_two)
    assert stored.dtype == torch.uint8 and stored.shape == (2, tokens, rank + 4 * tiles + 4 * half)
    back = dequantize_latent(stored, rank, torch.float32)
    scales = split_stored(stored, rank)[1].repeat_interleave(128, -1)[..., :rank]
    assert not power_of_two or (torch.frexp(scales).mantissa == 0.5).all()
    bound = torch.maximum(x[..., :rank].abs() * HALF_STEP, scales * SMALLEST) * (1 + 1e-5)
    assert ((back - x)[..., :rank].abs() <= bound).all()
    assert torch.equal(back[..., rank:], x[..., rank:].bfloat16().float())


def test_the_bytes_lie_as_described() -> None:
    x = torch.zeros(1, 128 + 2)
    x[0, 0], x[0, 128], x[0, 129] = 896.0, 1.0, -2.0
    row = quantize_latent(x, 128)[0]
    assert row[0] == 0x7E and not row[1:128].any()  # 448, the largest E4M3
    assert row[128:132].view(torch.float32).item() == 2.0
    assert row[132:].view(torch.bfloat16).tolist() == [1.0, -2.0]


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.zeros(3, 256 + 2)
    x[1, 5], x[2, 200] = float("nan"), float("inf")
    stored = quantize_latent(x, 256)
    assert (split_stored(stored, 256)[1][0] == 1).all()
    back = dequantize_latent(stored, 256, torch.float32)
    assert (back[0] == 0).all()
    assert back[1, 5].isnan() and back[1, 128:].eq(0).all()
    assert back[2, 200].isnan() and back[2, :128].eq(0).all()


def test_the_bound_sees_a_wrong_scale() -> None:
    x = torch.randn(4, 128 + 2)
    stored = quantize_latent_ref(x, 128)
    split_stored(stored, 128)[1].mul_(1.2)
    error = (dequantize_latent(stored, 128, torch.float32) - x)[:, :128].abs()
    assert (error > x[:, :128].abs() * HALF_STEP + 1e-3).any()


def test_what_is_refused() -> None:
    with pytest.raises(KernelError, match="rank is 98, expected a multiple of 4"):
        quantize_latent(torch.zeros(2, 104), 98)
    with pytest.raises(KernelError, match="multiple of 2"):
        quantize_latent(torch.zeros(2, 131), 128)
    with pytest.raises(KernelError, match="hold no key"):
        quantize_latent(torch.zeros(2, 128), 128)
    with pytest.raises(KernelError, match="float64"):
        quantize_latent(torch.zeros(2, 130, dtype=torch.float64), 128)
    with pytest.raises(KernelError, match="expected 132"):
        dequantize_latent(torch.zeros(2, 100, dtype=torch.uint8), 128)
    with pytest.raises(KernelError, match="dtype is torch.int8"):
        dequantize_latent(torch.zeros(2, 136, dtype=torch.uint8), 128, torch.int8)
