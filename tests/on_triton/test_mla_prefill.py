"""Attention over packed documents: kernels against the plain formula in FP64, forward and backward."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.attention.mla_prefill import mla_prefill, mla_prefill_ref

MOST_COSINE = 5e-6  # of 1 - 2·Σxy/Σ(x² + y²)
MOST_GRADIENT = 1e-5  # of a product in BF16
LSE_ABSOLUTE, LSE_RELATIVE = 1e-6, 8 / 65536
SMALL = {"TMA": 0, "BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
OPERATIONS = ("mla_prefill", "mla_prefill_dq", "mla_prefill_dkv")


def borders(lengths: list[int], device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(device)


class Case:
    """Packed documents with operands that want gradients."""

    def __init__(
        self, device, dtype, lengths, heads, widths, seed=0, key_lengths=None, shared=False, causal=True
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        self.starts = borders(lengths, device)
        self.k_starts = None if key_lengths is None else borders(key_lengths, device)
        n_queries, n_keys = sum(lengths), sum(lengths if key_lengths is None else key_lengths)
        qk, value, rope = widths
        self.q, self.v = draw(n_queries, heads, qk), draw(n_keys, heads, value)
        self.k = draw(n_keys, heads, qk - rope if shared else qk)
        self.k_rope = draw(n_keys, rope) if shared else None
        self.scale, self.causal = qk**-0.5, causal
        self.grad = draw(n_queries, heads, value).detach()

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [x for x in (self.q, self.k, self.v, self.k_rope) if x is not None]

    def run(self, **options):
        """out, lse and the gradients of all inputs."""
        rest = (self.starts, self.scale, self.causal, self.k_starts, self.k_rope)
        out, lse = mla_prefill(self.q, self.k, self.v, *rest, **options)
        return out, lse, *torch.autograd.grad(out, self.inputs, self.grad)

    def expected(self):
        """The same from the plain formula in FP64."""
        exact = [x.detach().double().requires_grad_() for x in self.inputs]
        rope = exact[3] if len(exact) > 3 else None
        out, lse = mla_prefill_ref(*exact[:3], self.starts, self.scale, self.causal, self.k_starts, rope)
        return out, lse, *torch.autograd.grad(out, exact, self.grad.double())


def cosine_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    size = (x * x + y * y).sum()
    return float(1 - 2 * (x * y).sum() / size) if size != 0 else 0.0


def assert_close(got, wanted) -> None:
    out, lse, *grads = got
    out_wanted, lse_wanted, *grads_wanted = wanted
    assert cosine_difference(out, out_wanted) < MOST_COSINE
    assert lse.dtype == torch.float32 and not lse.requires_grad
    seen = lse_wanted > float("-inf")
    assert torch.equal(lse > float("-inf"), seen) and not lse.isnan().any()
    assert (out.transpose(0, 1)[~seen] == 0).all()
    torch.testing.assert_close(
        lse[seen].double(), lse_wanted[seen].detach(), atol=LSE_ABSOLUTE, rtol=LSE_RELATIVE
    )
    for grad, grad_wanted in zip(grads, grads_wanted, strict=True):
        assert grad.dtype == out.dtype and grad.shape == grad_wanted.shape
        assert cosine_difference(grad, grad_wanted) < MOST_GRADIENT


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 65]), min_size=1, max_size=3)
WIDTHS = st.sampled_from([(24, 16, 8), (16, 16, 4), (10, 6, 4), (48, 32, 16)])


@settings(max_examples=7)
@given(
    lengths=LENGTHS,
    widths=WIDTHS,
    single=st.booleans(),
    shared=st.booleans(),
    causal=st.booleans(),
    seed=SEEDS,
)
def test_it_is_the_formula(device, matrix_dtype, lengths, widths, single, shared, causal, seed) -> None:
    dtype = torch.float32 if single else matrix_dtype
    case = Case(device, dtype, lengths, 2, widths, seed, shared=shared, causal=causal)
    assert_close(case.run(settings=dict.fromkeys(OPERATIONS, SMALL)), case.expected())


@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=3),
    widths=WIDTHS,
    causal=st.booleans(),
    seed=SEEDS,
)
def test_prefill_behind_a_cache(device, matrix_dtype, lengths, widths, causal, seed) -> None:
    """More keys than queries: those before them; fewer: the first queries see nothing."""
    queries, keys = map(list, zip(*lengths, strict=True))
    case = Case(device, matrix_dtype, queries, 1, widths, seed, key_lengths=keys, causal=causal)
    assert_close(case.run(settings=dict.fromkeys(OPERATIONS, SMALL)), case.expected())


@pytest.mark.parametrize("shared", [False, True])
def test_v3s_sizes(device, matrix_dtype, shared) -> None:
    """The shipped settings: a long document, a short one, and one that ends just past a tile."""
    case = Case(device, matrix_dtype, [129, 3, 0, 65], 2, (192, 128, 64), shared=shared)
    assert_close(case.run(), case.expected())


def test_every_tile_gives_the_same(device, matrix_dtype) -> None:
    """Copy engine or ordinary loads, tiles that span documents or not."""
    case = Case(device, matrix_dtype, [70, 1, 0, 40], 1, (48, 32, 16), shared=True)
    wanted = case.expected()
    for tma in (0, 1):
        for queries, keys in ((16, 16), (64, 32)):
            row = {**SMALL, "TMA": tma, "BLOCK_M": queries, "BLOCK_N": keys}
            assert_close(case.run(settings=dict.fromkeys(OPERATIONS, row)), wanted)


def test_a_batch_is_documents_of_one_length(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [33, 33], 2, (24, 16, 8))
    out = case.run()[0].view(2, 33, 2, 16)
    for b in range(2):
        q, k, v = (x.detach().view(2, 33, *x.shape[1:])[b] for x in (case.q, case.k, case.v))
        one, _ = mla_prefill(q, k, v, borders([33], device), case.scale)
        assert cosine_difference(out[b], one) < 1e-12


def test_the_same_input_gives_the_same_bits(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [70, 20], 2, (24, 16, 8), shared=True)
    for first, second in zip(case.run(), case.run(), strict=True):
        assert torch.equal(first, second)


def test_operands_may_lie_apart(device, matrix_dtype) -> None:
    """As the model has them: keys and values are parts of one product's result."""
    wanted = Case(device, matrix_dtype, [40, 9], 2, (48, 32, 16), shared=True)
    both = torch.full((49, 2, 80), float("nan"), dtype=matrix_dtype, device=device)
    case = Case(device, matrix_dtype, [40, 9], 2, (48, 32, 16), shared=True)
    both[..., :32], both[..., 40:72] = case.k.detach(), case.v.detach()
    case.k, case.v = both[..., :32].requires_grad_(), both[..., 40:72].requires_grad_()
    case.q = case.q.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not case.q.is_contiguous() and not case.k.is_contiguous()
    for got, expected in zip(case.run(), wanted.run(), strict=True):
        assert torch.equal(got, expected)


def test_what_lies_past_the_last_border_is_not_seen(device, matrix_dtype) -> None:
    case = Case(device, matrix_dtype, [30, 20], 1, (24, 16, 8))
    case.starts = case.starts[:2].contiguous()
    out, lse, dq, dk, dv = case.run()
    assert (out[30:] == 0).all() and (lse[:, 30:] == float("-inf")).all()
    assert not any(g[30:].any() for g in (dq, dk, dv))
    assert all(g[:30].any() for g in (dq, dk, dv))


def test_nothing_to_do(device, matrix_dtype) -> None:
    for lengths in ([], [0], [0, 0]):
        out, lse, *grads = Case(device, matrix_dtype, lengths, 2, (24, 16, 8)).run()
        assert out.shape == (0, 2, 16) and lse.shape == (2, 0) and all(g.numel() == 0 for g in grads)


@pytest.mark.parametrize("wrong", ["scale", "causal", "border", "rope"])
def test_the_comparison_sees_a_wrong_answer(device, matrix_dtype, wrong) -> None:
    case = Case(device, matrix_dtype, [40, 30], 1, (24, 16, 8), shared=True)
    wanted = case.expected()
    assert_close(case.run(), wanted)
    if wrong == "scale":
        case.scale *= 1.01
    elif wrong == "causal":
        case.causal = False
    elif wrong == "border":
        case.starts[1] += 1
    else:
        case.k_rope = case.k_rope.detach().roll(1, 0).requires_grad_()
    with pytest.raises(AssertionError):
        assert_close(case.run(), wanted)


def test_what_is_refused(device, matrix_dtype) -> None:
    unchecked = inspect.unwrap(mla_prefill)  # without the tests' own check of annotations

    def refused(word: str, **changes) -> None:
        case = Case(device, matrix_dtype, [5, 3], 2, (24, 16, 8))
        for name, change in changes.items():
            setattr(case, name, change(getattr(case, name)))
        with pytest.raises(KernelError, match=word):
            rest = (case.starts, case.scale, case.causal, case.k_starts, case.k_rope)
            unchecked(case.q, case.k, case.v, *rest)

    refused("k is", k=lambda k: k.float())
    refused("k has shape", k=lambda k: k[..., :10])
    refused("pass k_starts", k=lambda k: k[:7], v=lambda v: v[:7])
    refused("v has shape", v=lambda v: v[:7])
    refused("side by side", q=lambda q: q.transpose(0, 2).contiguous().transpose(0, 2))
    refused("k_starts has shape", k_starts=lambda _: torch.zeros(2, dtype=torch.int32, device=device))
    refused("at least one border", starts=lambda s: s[:0])
    refused("k has shape", k_rope=lambda _: torch.zeros(8, 8, dtype=matrix_dtype, device=device))
