"""Products by oneDNN against torch's own, in every order of memory, with their derivatives, alone and in a model."""

import math
import platform
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig, doctor, gemm
from dsv3lib.backends import cpu_attention, cpu_experts
from dsv3lib.backends.cpu import Cpu
from dsv3lib.backends.cpu_attention import MOST_TOKENS, ROWS, causal_attention_ref, long_attention
from dsv3lib.layers.experts import sort_by_expert

HAS_ONEDNN = gemm.has_onednn()
onednn_alone = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")
# Sizes on both sides of what oneDNN is asked for, 2^21 multiplications.
ROWS_OF_X, WIDTHS = st.sampled_from([1, 15, 16, 100, 513]), st.sampled_from([15, 16, 64, 129])
CONFIG = ModelConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=96, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=2, topk_group=1, kv_lora_rank=64, q_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    max_position_embeddings=4096, num_nextn_predict_layers=1, initializer_range=0.05,
)  # fmt: skip


@pytest.fixture
def onednn(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN whatever the processor; the shapes that it was given."""
    seen, real = [], gemm.onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*x.shape, *weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(gemm, "by_onednn", lambda: True)
    monkeypatch.setattr(gemm, "onednn", counted)
    return seen


@pytest.fixture(scope="module", autouse=True)
def whatever_the_processor():
    """For the properties, which cannot have a fixture of one test: oneDNN where it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "by_onednn", lambda: HAS_ONEDNN)
        yield


def drawn(seed: int, *shape: int, by_columns: bool = False) -> Tensor:
    x = torch.randn(shape[::-1] if by_columns else shape, generator=torch.Generator().manual_seed(seed))
    return x.t() if by_columns else x


def near(found: Tensor, exact: Tensor) -> None:
    """As far from FP64 as FP32 explains: sums of up to some thousand products of order 1."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert float((found.double() - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))


@given(m=ROWS_OF_X, k=WIDTHS, n=WIDTHS, columns=st.tuples(st.booleans(), st.booleans()), seed=SEEDS)
def test_a_product_is_torchs_product(m: int, k: int, n: int, columns: tuple[bool, bool], seed: int) -> None:
    a, b = drawn(seed, m, k, by_columns=columns[0]), drawn(seed + 1, k, n, by_columns=columns[1])
    near(gemm.mm(a, b), a.double() @ b.double())


@given(m=ROWS_OF_X, k=WIDTHS, n=WIDTHS, bias=st.booleans(), by_columns=st.booleans(), flat=st.booleans(), seed=SEEDS)
def test_a_linear_layer_and_its_gradients_are_torchs(m, k, n, bias, by_columns, flat, seed) -> None:
    x, w = drawn(seed, m, k), drawn(seed + 1, n, k, by_columns=by_columns)
    x = x if flat else x[None]
    inputs = [x, w, drawn(seed + 2, 1, n)[0]][: 3 if bias else 2]
    towards = drawn(seed + 3, m, n).view(*x.shape[:-1], n)

    def everything(linear: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
        y = linear(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, towards.to(dtype))]

    for found, exact in zip(everything(gemm.linear, torch.float32), everything(F.linear, torch.float64), strict=True):
        near(found, exact)


@given(m=ROWS_OF_X, k=WIDTHS, n=WIDTHS, seed=SEEDS)
def test_a_weights_gradient_is_torchs(m: int, k: int, n: int, seed: int) -> None:
    grad, x = drawn(seed, m, n), drawn(seed + 1, m, k)
    found = gemm.weight_gradient(grad, x)
    near(found, grad.double().t() @ x.double())
    assert found.is_contiguous()


@given(n=st.integers(1, 100_000))
def test_rows_are_padded_by_little_and_in_few_steps(n: int) -> None:
    filled = gemm.padded_size(n)
    assert n <= filled and gemm.padded_size(filled) == filled
    assert filled - n < max(16, n / gemm.STEPS)
    octave = {gemm.padded_size(i) for i in range(2**12 + 1, 2**13 + 1)}
    assert len(octave) == gemm.STEPS if HAS_ONEDNN else len(octave) == 2**12


@onednn_alone
def test_second_derivatives_are_torchs(onednn) -> None:
    inputs = drawn(0, 256, 96), drawn(1, 128, 96), drawn(2, 1, 128)[0]

    def twice(linear: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        first = torch.autograd.grad(linear(*leaves).square().mean(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    found = twice(gemm.linear, torch.float32)
    assert len(onednn) >= 4  # forward, the input's gradient, and theirs
    for a, b in zip(found, twice(F.linear, torch.float64), strict=True):
        near(a, b)


@onednn_alone
def test_what_onednn_is_asked_for(onednn) -> None:
    x, w = drawn(0, 256, 128), drawn(1, 128, 128)
    gemm.linear(x, w), gemm.mm(x, w), gemm.mm(x.t(), x)
    assert onednn == [(256, 128, 128, 128), (256, 128, 128, 128), (128, 256, 128, 256)]
    onednn.clear()
    wide = drawn(1, 128, 160)
    gemm.linear(x[:64], w)  # small
    gemm.linear(x.double(), w.double()), gemm.linear(x.bfloat16(), w.bfloat16())
    gemm.linear(x, wide[:, :128])  # gaps between its rows: oneDNN's slow form
    with torch.autocast("cpu", torch.bfloat16):
        assert gemm.linear(x, w).dtype == torch.bfloat16
    assert torch.func.vmap(lambda rows: gemm.linear(rows, w))(x.expand(2, -1, -1)).shape == (2, 256, 128)
    with FlopCounterMode(display=False) as counter:  # who counts products finds them
        gemm.linear(x, w), gemm.mm(x, w)
    assert counter.get_total_flops() == 2 * 2 * 256 * 128 * 128
    assert not onednn
    for wrong in (drawn(1, 128, 96), drawn(1, 96, 128)[:, :127]):  # torch's error, nothing is read past an end
        with pytest.raises(RuntimeError):
            gemm.linear.__wrapped__(x, wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, as it derives forward
def test_a_forward_derivative_is_not_lost() -> None:
    """oneDNN's operation would drop it without a word."""
    x, w = drawn(0, 256, 128), drawn(1, 128, 128)
    with forward_ad.dual_level():
        y = gemm.linear(forward_ad.make_dual(x, torch.ones_like(x)), w)
        near(forward_ad.unpack_dual(y).tangent, w.double().sum(1).expand(256, -1))


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="promised by Linux builds alone")
def test_torch_still_has_the_operation() -> None:
    """It is no public one: were it gone, what is above would be skipped and AMD's processors run at half speed."""
    assert HAS_ONEDNN


@pytest.mark.parametrize(
    ("capability", "words", "expected"),
    [
        ("AVX512", "vendor_id\t: AuthenticAMD", HAS_ONEDNN),
        ("AVX512", "vendor_id\t: GenuineIntel", False),
        ("AVX2", "vendor_id\t: AuthenticAMD", False),
    ],
)
def test_the_processor_decides(monkeypatch, capability: str, words: str, expected: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(gemm, "vendor", lambda: words)
    assert chosen() is expected
    name = {True: "oneDNN", False: "torch's BLAS"}
    monkeypatch.setattr(gemm, "by_onednn", lambda: expected)
    assert f"products by {name[expected]}" in doctor.check_torch().value


chosen = gemm.by_onednn.__wrapped__


def test_where_there_is_no_proc_the_platform_names_the_processor(monkeypatch) -> None:
    monkeypatch.setattr(gemm.Path, "read_text", gone)
    monkeypatch.setattr(gemm.platform, "processor", lambda: "AMD64 Family 26, AuthenticAMD")
    assert "AuthenticAMD" in gemm.vendor()


def gone(*_: object, **__: object) -> str:
    raise FileNotFoundError


# ---- in the model --------------------------------------------------------------------------------------


def everything_of_a_model(dtype: torch.dtype) -> list[Tensor]:
    """Logits behind a cache, of long attention among others, and a training step's loss and gradients."""
    model = DeepSeekV3(CONFIG, torch.Generator().manual_seed(0)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CONFIG.vocab_size, (1, 700), generator=generator)
    cache = LatentCache(CONFIG)
    with torch.inference_mode():
        logits = [model(part, cache=cache).logits.clone() for part in ids.split([400, 300], 1)]
    batch = torch.randint(CONFIG.vocab_size, (4, 150), generator=generator)
    loss = model(batch, labels=batch).loss
    loss.backward()
    return [*logits, loss.detach(), *(p.grad for p in model.parameters())]


def largest_difference(found: list[Tensor], exact: list[Tensor]) -> float:
    differences = (float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
    return max(differences)


@onednn_alone
def test_a_model_by_onednn_is_the_model(onednn) -> None:
    exact = everything_of_a_model(torch.float64)
    assert not onednn
    found = everything_of_a_model(torch.float32)
    assert len(onednn) > 40
    rows = {math.prod(shape[:-3]) for shape in onednn}
    assert {gemm.padded_size(n) for n in rows} == rows, "shapes that nobody will meet again"
    assert largest_difference(found, exact) <= 1e-4  # FP32 by MKL comes as near


def experts(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Experts with numbers of rows that are no multiples of anything: their answers and all gradients."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, w_in, w_out, weights = some(331, 128), some(3, 192, 128), some(3, 128, 96), some(331, 2)
    indices = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(331)])
    y = cpu_experts.experts_one_by_one(x, weights, w_in, w_out, sort_by_expert(indices, 3))
    y.backward(some(*y.shape).detach())
    return [y.detach(), *(t.grad for t in (x, w_in, w_out, weights))]


@onednn_alone
def test_rows_behind_an_experts_own_count_nothing(onednn, monkeypatch) -> None:
    exact = experts(0, torch.float64)
    assert largest_difference(experts(0, torch.float32), exact) <= 1e-5
    assert onednn and all(gemm.padded_size(length) == length for shape in onednn for length in shape)
    monkeypatch.setattr(Tensor, "zero_", lambda self: self.fill_(1.0))
    assert largest_difference(experts(0, torch.float32), exact) > 1e-3


# ---- attention over long contexts ----------------------------------------------------------------------


@given(
    n=st.integers(1, 3),
    new=st.sampled_from([1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5]),
    past=st.sampled_from([0, 1, 255, 256, 300, 1000]),
    seed=SEEDS,
)
def test_long_attention_is_the_whole_square(n: int, new: int, past: int, seed: int) -> None:
    found, expected = long(n, new, past, seed, torch.float32)
    near(found, expected)
    found, expected = long(n, new, past, seed, torch.float64)
    assert float((found - expected).abs().max()) <= 1e-12


def long(n: int, new: int, past: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = new + past
    q, k, v = (torch.randn(n, t, w, generator=generator) for t, w in ((total, 24), (total, 24), (total, 16)))
    expected = causal_attention_ref(*(x.double() for x in (q, k, v)), 0.3)[:, past:]
    return long_attention(*(x.to(dtype) for x in (q[:, past:], k, v)), 0.3), expected


def test_a_mask_off_by_one_would_show(monkeypatch) -> None:
    monkeypatch.setattr(
        cpu_attention, "above_diagonal", lambda n, like, width: like.new_full((n, width), -torch.inf).triu_(2)
    )
    found, expected = long(2, 200, 100, 0, torch.float64)
    assert float((found - expected).abs().max()) > 1e-3


@onednn_alone
def test_who_attends(onednn, monkeypatch) -> None:
    """Long contexts and tokens behind a cache, in inference; where a gradient is wanted torch's fused kernel."""
    calls: list[int] = []
    real = cpu_attention.long_attention
    monkeypatch.setattr("dsv3lib.backends.cpu.long_attention", lambda *x: calls.append(x[0].shape[1]) or real(*x))

    def attend(new: int, past: int, dtype: torch.dtype = torch.float32, gradient: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, 2, t, w, generator=generator).to(dtype).requires_grad_(gradient)
            for t, w in ((new, 24), (new + past, 24), (new + past, 16))
        )
        found = Cpu().attend(q, k, v, None, 0.3)
        padded = torch.cat([q.new_zeros(1, 2, past, 24), q], 2)[0]
        expected = causal_attention_ref(padded.double(), k[0].double(), v[0].double(), 0.3)[:, past:]
        assert float((found[0] - expected).detach().abs().max()) <= 1e-5

    attend(MOST_TOKENS, 0), attend(1, 600), attend(90, 600, torch.float64), attend(90, 600, gradient=True)
    assert not calls
    attend(MOST_TOKENS + 1, 0), attend(90, 600)
    assert calls == [MOST_TOKENS + 1, 90]
