"""The fused quantisers: what they keep is the plain form's, and what they quantise is what they keep, bit by bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from poison import assert_same, poisoned, spread
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.elementwise import rms_norm_ref, swiglu, swiglu_ref
from dsv3lib.kernels.quantize import fused as f
from dsv3lib.kernels.quantize import reference as ref

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
EPS = 1e-6


def random(*shape: int, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    """Fresh numbers of sizes from small to large, different for each shape and seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    return x.to(dtype).to(device)


def assert_near(kept: torch.Tensor, exact: torch.Tensor) -> None:
    """Within one rounding to the dtype and a few of FP32."""
    allowed = (0.75 * torch.finfo(kept.dtype).eps + 16 * 2.0**-23) * exact.abs() + 2.0**-24
    assert ((kept.double() - exact).abs() <= allowed).all()


@given(rows=st.integers(0, 5), tiles=st.integers(1, 3), apart=st.booleans(), power_of_two=st.booleans(), dtype=DTYPES,
       seed=SEEDS)  # fmt: skip
def test_swiglu(device, rows, tiles, apart, power_of_two, dtype, seed) -> None:
    both = random(rows, 256 * tiles, dtype=dtype, seed=seed, device=device)
    with poisoned():
        got = f.swiglu_quantize(spread(both) if apart else both, power_of_two, keep=True)
        alone = f.swiglu_quantize(both, power_of_two, settings={"TILES": 2, "num_warps": 1})
    assert_near(got.kept, swiglu_ref(both.double()))
    assert torch.equal(got.kept, swiglu(both))
    assert_same(got[:2], ref.quantize_tiles_ref(got.kept, power_of_two))
    assert_same(alone[:2], got[:2])
    assert alone.kept is None and got.inverse_rms is None


@given(rows=st.integers(0, 5), tiles=st.integers(1, 5), apart=st.booleans(), power_of_two=st.booleans(), dtype=DTYPES,
       seed=SEEDS)  # fmt: skip
def test_rms_norm(device, rows, tiles, apart, power_of_two, dtype, seed) -> None:
    x = random(rows, 128 * tiles, dtype=dtype, seed=seed, device=device)
    weight = random(128 * tiles, dtype=dtype, seed=seed, device=device)
    with poisoned():
        got = f.rms_norm_quantize(spread(x) if apart else x, weight, EPS, power_of_two, keep=True)
        alone = f.rms_norm_quantize(x, weight, EPS, power_of_two, settings={"ROWS": 2, "num_warps": 1})
    assert_near(got.kept, rms_norm_ref(x.double(), weight.double(), EPS))
    assert_same(got[:2], ref.quantize_tiles_ref(got.kept, power_of_two))
    assert_same(alone[:2], got[:2])
    exact = torch.rsqrt(x.double().square().mean(-1) + EPS).float()
    torch.testing.assert_close(got.inverse_rms, exact, rtol=4e-6, atol=0)
    assert alone.kept is None and torch.equal(alone.inverse_rms, got.inverse_rms)


def test_more_dimensions_and_nan(device) -> None:
    both = random(2, 3, 512, dtype=torch.float32, seed=0, device=device)
    both[1, 2, 5] = float("nan")
    values, scales, _, _ = f.swiglu_quantize(both)
    assert values.shape == (2, 3, 256) and scales.shape == (2, 3, 2)
    assert values[1, 2, :128].float().isnan().all() and values.float().isnan().sum() == 128
    values, scales, _, inverse_rms = f.rms_norm_quantize(both, torch.ones(512, device=device), EPS)
    assert scales.shape == (2, 3, 4) and inverse_rms.shape == (2, 3)
    assert values[1, 2].float().isnan().all() and values.float().isnan().sum() == 512


@pytest.mark.parametrize("wrong", ["halves swapped", "scales from before the product"])
def test_a_wrong_form_is_seen(device, wrong: str) -> None:
    both = random(3, 256, dtype=torch.float32, seed=1, device=device)
    got = f.swiglu_quantize(both)
    if wrong == "halves swapped":
        expected = f.swiglu_quantize_ref(both.roll(128, -1))
    else:
        expected = f.swiglu_quantize_ref(both)._replace(scales=ref.quantize_tiles_ref(both[:, :128])[1])
    with pytest.raises(AssertionError, match="differ"):
        assert_same(got[:2], expected[:2])


def test_what_does_not_fit_is_refused(device) -> None:
    x = torch.zeros(2, 384, device=device)
    for match, call in (
        ("multiple of 256", lambda: f.swiglu_quantize(x)),
        ("multiple of 128", lambda: f.rms_norm_quantize(x[:, :100], x[0, :100], EPS)),
        ("gate_up is float8", lambda: f.swiglu_quantize(x.to(torch.float8_e4m3fn))),
        ("x is float8", lambda: f.rms_norm_quantize(x.to(torch.float8_e4m3fn), x[0], EPS)),
        ("weight has shape", lambda: f.rms_norm_quantize.__wrapped__(x, x[0, :5], EPS)),
    ):
        with pytest.raises(KernelError, match=match):
            call()
