"""What the code of absorbed decoding must hold, beyond fitting: each score computed once, pages brought by copies."""

import re

import pytest

from dsv3lib.kernels.toolchain import aot, language

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")

STEP = 16  # columns that one matrix instruction sums over in BF16
BODIES = 2  # whole tiles, and the partly filled one


def compiled(swap: int) -> aot.Compiled:
    """BF16 at V3's sizes for a Hopper: many rows, or few rows transposed."""
    builds = (b for b in aot.builds(("mla_decode",), ("sm_90",)) if b.specimen.operation == "mla_decode")
    return aot.compile_build(next(b for b in builds if b.specimen.variant == "" and b.row["SWAP"] == swap))


def products(ptx: str) -> dict[str, int]:
    """How many matrix instructions of each shape."""
    shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k16)", ptx)
    return {shape: shapes.count(shape) for shape in set(shapes)}


def test_no_score_is_computed_twice() -> None:
    """64 rows x 64 tokens over 8 warps: each half takes 32 tokens, not all of them (see ``_attend``)."""
    found = products(compiled(swap=0).ptx)
    assert found == {"m64n32k16": BODIES * (512 + 64) // STEP, "m64n256k16": BODIES * 64 // STEP}


def test_few_rows_are_not_padded_to_64() -> None:
    assert set(products(compiled(swap=1).ptx)) == {"m64n16k16"}


@pytest.mark.parametrize("swap", [0, 1])
def test_pages_come_by_the_copy_engine(swap: int) -> None:
    assert "cp.async.bulk.tensor" in compiled(swap).ptx
