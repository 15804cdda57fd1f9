"""The FP8 latent: kernels against the plain form, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.kernels.attention.latent_format import (
    dequantize_latent,
    dequantize_latent_ref,
    quantize_latent,
    quantize_latent_ref,
    split_stored,
)
from dsv3lib.kernels.toolchain import targets

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=15)
@given(
    rows=st.sampled_from([0, 1, 3, 5, 9]),
    sizes=st.sampled_from([(128, 2), (64, 16), (384, 6), (512, 64), (200, 4)]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    size=st.integers(-8, 8),
    seed=SEEDS,
)
def test_bit_for_bit(device, rows, sizes, power_of_two, dtype, size, seed) -> None:
    targets.require_fp8("test", device)
    rank, rope = sizes
    x = torch.randn(2, rows, rank + rope, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    if rows:
        x[0, 0, :128] = 0
    x = x.to(device, dtype)
    stored = quantize_latent(x, rank, power_of_two)
    assert torch.equal(stored, quantize_latent_ref(x, rank, power_of_two))
    for kind in DTYPES:
        assert torch.equal(dequantize_latent(stored, rank, kind), dequantize_latent_ref(stored, rank, kind))


# The interpreter's NumPy warns of inf / inf, which is what is asked for here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_may_lie_apart_and_hold_nan(device) -> None:
    wide = torch.full((6, 300), float("nan"), device=device)
    wide[:, 20 : 20 + 258] = torch.randn(6, 258, device=device)
    x = wide[:, 20 : 20 + 258]
    assert torch.equal(quantize_latent(x, 256), quantize_latent_ref(x, 256))
    x[1, 3], x[2, 255] = float("nan"), float("inf")
    back = dequantize_latent(quantize_latent(x, 256), 256, torch.float32)
    assert back[1, 3].isnan()
    assert not back[2, 128:256].isfinite().any()  # E4M3's NaN reads as 480 in the interpreter: 480 · inf
    assert not back[1, 128:].isnan().any() and not back[0].isnan().any()


def test_the_comparison_sees_one_wrong_bit(device) -> None:
    x = torch.randn(2, 130, device=device)
    stored = quantize_latent(x, 128)
    split_stored(stored, 128)[0].view(torch.uint8)[1, 7] ^= 1
    with pytest.raises(AssertionError):
        assert torch.equal(stored, quantize_latent_ref(x, 128))
