"""Absorbed decoding: the kernel against the plain formula, with everything that must not be read set to NaN."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.attention.latent_format import quantize_latent_ref, stored_bytes
from dsv3lib.kernels.attention.mla_decode import as_pages, mla_decode, mla_decode_ref
from dsv3lib.kernels.toolchain import targets, tuning

PAGE = 64
MOST_COSINE = 5e-6  # of 1 - 2·Σxy/Σ(x² + y²)
LSE_ABSOLUTE, LSE_RELATIVE = 1e-6, 8 / 65536
EXAMPLES = settings(max_examples=12)


class Case:
    """A paged cache whose pages lie in random order, with NaN wherever no token is."""

    def __init__(self, device, dtype, lengths, new, heads, rank, rope, seed=0, fp8=False):
        generator = torch.Generator().manual_seed(seed)
        per_row = max(1, *(-(-n // PAGE) for n in lengths)) + 1  # each row has room to spare
        pages = len(lengths) * per_row + 2
        table = torch.randperm(pages, generator=generator)[: len(lengths) * per_row].view(len(lengths), -1)
        latents = torch.randn(pages, PAGE, rank + rope, generator=generator)
        used = torch.zeros(pages, PAGE, dtype=torch.bool)
        for row, n in zip(table, lengths, strict=True):
            used[row[:, None].expand(-1, PAGE).flatten()[:n], torch.arange(n) % PAGE] = True
        if fp8:
            cache = quantize_latent_ref(latents, rank)
            cache[~used] = 255  # NaN in each of the three types
        else:
            cache = latents.to(dtype)
            cache[~used] = float("nan")
        q = torch.randn(len(lengths), new, heads, rank + rope, generator=generator).to(dtype)
        self.rank, self.scale = rank, (rank + rope) ** -0.5
        self.q, self.cache, self.table = q.to(device), cache.to(device), table.int().to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def arguments(self) -> tuple:
        return self.q, self.cache, self.table, self.lengths, self.scale, self.rank

    def run(self, **options):
        return mla_decode(*self.arguments(), **options)

    def refused(self, word: str, **options) -> None:
        """Without the tests' own check of annotations, which would come first."""
        with pytest.raises(KernelError, match=word):
            inspect.unwrap(mla_decode)(*self.arguments(), **options)

    def expected(self):
        """The plain formula in FP64 on the same rounded operands."""
        q, cache = self.q.double(), self.cache
        if cache.dtype == torch.uint8:
            return mla_decode_ref(*self.arguments())
        return mla_decode_ref(q, cache.double(), *self.arguments()[2:])


def cosine_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2·Σxy/Σ(x² + y²) in FP64: 0 for equal tensors, NaN if one holds NaN."""
    x, y = x.double(), y.double()
    size = (x * x + y * y).sum()
    return float(1 - 2 * (x * y).sum() / size) if size != 0 else 0.0


def assert_close(got, wanted) -> None:
    out, lse = got
    out_wanted, lse_wanted = wanted
    assert lse.dtype == torch.float32
    assert cosine_difference(out, out_wanted) < MOST_COSINE
    seen = lse_wanted > float("-inf")
    assert torch.equal(lse > float("-inf"), seen) and not lse.isnan().any()
    assert (out[~seen] == 0).all()
    torch.testing.assert_close(
        lse[seen].double(), lse_wanted[seen].double(), atol=LSE_ABSOLUTE, rtol=LSE_RELATIVE
    )


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 130, 200]), min_size=1, max_size=3)


@EXAMPLES
@given(
    lengths=LENGTHS,
    new=st.integers(1, 4),
    heads=st.sampled_from([1, 4, 5, 16, 17, 20, 48]),
    sizes=st.sampled_from([(32, 8), (24, 4), (64, 16), (17, 6)]),
    single=st.booleans(),
    splits=st.sampled_from([None, 1, 2, 5]),
    seed=SEEDS,
)
def test_it_is_the_formula(device, matrix_dtype, lengths, new, heads, sizes, single, splits, seed) -> None:
    dtype = torch.float32 if single else matrix_dtype
    case = Case(device, dtype, lengths, new, heads, *sizes, seed)
    out, lse = case.run(splits=splits)
    assert out.dtype == dtype and out.shape == (*case.q.shape[:3], sizes[0])
    assert_close((out, lse), case.expected())


@settings(max_examples=6)
@given(
    lengths=LENGTHS,
    new=st.integers(1, 4),
    heads=st.sampled_from([3, 16, 20]),
    sizes=st.sampled_from([(128, 64), (384, 8), (128, 6)]),
    splits=st.sampled_from([None, 3]),
    seed=SEEDS,
)
def test_the_fp8_cache(device, matrix_dtype, lengths, new, heads, sizes, splits, seed) -> None:
    targets.require_fp8("test", device)
    case = Case(device, matrix_dtype, lengths, new, heads, *sizes, seed, fp8=True)
    assert_close(case.run(splits=splits), case.expected())


@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_v3s_sizes(device, matrix_dtype, heads, fp8) -> None:
    """Each of the shipped settings, with a partly filled page and a whole one."""
    case = Case(device, matrix_dtype, [100], 1, heads, 512, 64, fp8=fp8)
    assert_close(case.run(splits=1), case.expected())


def test_every_shape_of_tile_gives_the_same(device, matrix_dtype) -> None:
    """Transposed or not, copy engine or ordinary loads, whole pages or half: the settings change no result."""
    case = Case(device, matrix_dtype, [130, 64], 2, 8, 64, 16)
    wanted = case.expected()
    for swap in (0, 1):
        for tma in (0, 1):
            for tokens in (32, 64):
                row = {"SWAP": swap, "TMA": tma, "BLOCK_ROWS": 16, "BLOCK_N": tokens, "RESIDENT": 1}
                assert_close(case.run(settings={**row, "num_warps": 4, "num_stages": 1}), wanted)


def test_the_same_input_gives_the_same_bits(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [300, 190], 1, 16, 64, 16)
    first, second = case.run(splits=4), case.run(splits=4)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_queries_may_lie_apart(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [70, 5], 1, 8, 32, 8)
    wanted = case.run()
    wide = torch.full((2, 1, 8, 100), float("nan"), dtype=matrix_dtype, device=device)
    wide[..., 30:70] = case.q
    case.q = wide[..., 30:70]
    assert not case.q.is_contiguous()
    assert torch.equal(case.run()[0], wanted[0])
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.run()[0], wanted[0])


def test_nothing_to_do(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [0, 0], 2, 4, 32, 8)
    out, lse = case.run()
    assert (out == 0).all() and (lse == float("-inf")).all()
    case.q, case.table, case.lengths = case.q[:0], case.table[:0], case.lengths[:0]
    assert case.run()[0].shape == (0, 2, 4, 32)


def test_a_buffer_seen_as_pages(device, matrix_dtype) -> None:
    buffer = torch.randn(3, 192, 40, device=device).to(matrix_dtype)
    pages, table = as_pages(buffer)
    q = torch.randn(3, 1, 4, 40, device=device).to(matrix_dtype)
    lengths = torch.tensor([1, 70, 192], dtype=torch.int32, device=device)
    out, _ = mla_decode(q, pages, table, lengths, 0.2, 32)
    for b, n in enumerate([1, 70, 192]):
        tokens = buffer[b, :n].double()
        p = (q[b, 0].double() @ tokens.t() * 0.2).softmax(-1)
        assert cosine_difference(out[b, 0], p @ tokens[:, :32]) < MOST_COSINE


@pytest.mark.parametrize("wrong", ["one token more", "one token less", "scale", "page", "query"])
def test_the_comparison_sees_a_wrong_answer(device, matrix_dtype, wrong) -> None:
    case = Case(device, matrix_dtype, [130], 2, 4, 32, 8)
    case.cache = case.cache.nan_to_num(1.0)
    wanted = case.expected()
    assert_close(case.run(), wanted)
    if wrong.startswith("one token"):
        case.lengths += 1 if "more" in wrong else -1
    elif wrong == "scale":
        case.scale *= 1.01
    elif wrong == "page":
        case.table = case.table.flip(1)
    else:
        case.q = case.q.flip(1)
    with pytest.raises(AssertionError):
        assert_close(case.run(), wanted)


def test_nan_in_a_token_that_counts_is_not_hidden(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [70], 1, 4, 32, 8)
    case.cache[case.table[0, 0], 3] = float("nan")
    out, lse = case.run()
    assert out.isnan().all() and lse.isnan().all()


def test_what_is_refused(device, matrix_dtype) -> None:
    def case() -> Case:
        return Case(device, matrix_dtype, [70, 5], 1, 4, 32, 8)

    c = case()
    c.q = c.q.float()
    c.refused("cache is")
    c = case()
    c.rank = 40
    c.refused("value_dim is 40")
    c = case()
    c.q = c.q.expand(-1, 5, -1, -1)
    c.refused("5 new tokens")
    case().refused("splits is 0", splits=0)
    c = case()
    c.cache = c.cache[:, :32]
    c.refused("cache has shape")
    c = case()
    c.cache = c.cache.transpose(0, 1).contiguous().transpose(0, 1)
    c.refused("contiguous pages")
    c = case()
    c.table = c.table.long()
    c.refused("block_table")
    c = case()
    c.table = c.table[:1]
    c.refused("block_table")
    c = case()
    c.table = c.table.t().contiguous().t()
    c.refused("side by side")
    c = case()
    c.q.requires_grad_()
    c.refused("requires a gradient")
    with torch.no_grad():
        c.run()
    c = case()
    c.cache = torch.zeros(4, PAGE, 48, dtype=torch.uint8, device=device)
    c.refused("value_dim of an FP8 cache is 32")
    with pytest.raises(KernelError, match="multiple of 64"):
        as_pages(torch.zeros(2, 100, 40))


def test_the_cache_of_bytes_has_its_own_width(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [3], 1, 4, 128, 8, fp8=True)
    assert case.cache.shape[-1] == stored_bytes(128, 8) == 128 + 4 + 16
    case.cache = case.cache[..., :-2].contiguous()
    case.refused("cache has shape")


def test_settings_cover_every_size(device) -> None:
    for operation in ("mla_decode", "mla_decode_fp8"):
        for rows in (1, 16, 17, 32, 33, 128, 512):
            for size in (2, 4):
                assert tuning.pick(operation, device, rows=rows, bytes=size)["BLOCK_ROWS"] >= 16
