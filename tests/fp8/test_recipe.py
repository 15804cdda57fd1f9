"""A linear layer in FP8: its three products against a slow twin, what it keeps, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import ConfigError, KernelError
from dsv3lib.fp8 import Recipe
from dsv3lib.fp8 import recipe as module
from dsv3lib.fp8.formats import unpack_e5m6
from dsv3lib.fp8.operands import Operand, along_columns, along_rows, restored, weight_blocks
from dsv3lib.linear import PLAIN, Linear, linear, set_recipe, stacked_linear

NAMED = [name for name in module.NAMES if name != "none"]
CASES = {
    "tokens": st.integers(1, 140), "inputs": st.sampled_from([16, 48, 130, 256]),
    "outputs": st.sampled_from([24, 128, 200]), "name": st.sampled_from(NAMED), "seed": SEEDS,
}  # fmt: skip


def back(x: Operand, m: int, k: int) -> torch.Tensor:
    return (x.values.double()[:m, :k]) * x.scales.repeat_interleave(128, 1)[:m, :k]


def blocks_back(w: Operand) -> torch.Tensor:
    o, i = w.values.shape
    return w.values.double() * w.scales.repeat_interleave(128, 0)[:o].repeat_interleave(128, 1)[:, :i]


def run(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, recipe) -> tuple[torch.Tensor, ...]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight, None, recipe)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def check(layer, tokens: int, inputs: int, outputs: int, name: str, seed: int) -> None:
    """The three products in FP64 of what stands in the three pairs of operands, each made anew by hand."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(-5, 5, (tokens, 1), generator=draw).float().exp2()
    x = torch.randn(tokens, inputs, generator=draw) * size
    w, dy = torch.randn(outputs, inputs, generator=draw), torch.randn(tokens, outputs, generator=draw) * size
    recipe = Recipe.named(name)
    tile = recipe.inputs == "tile"
    cached = back(along_rows(x, recipe.inputs, power_of_two=tile), tokens, inputs)
    turned = back(along_columns(cached.float(), recipe.inputs, power_of_two=tile), inputs, tokens)
    weight = blocks_back(weight_blocks(w, recipe.weights))
    rows = back(along_rows(dy, recipe.gradients), tokens, outputs)
    columns = back(along_columns(dy, recipe.gradients), outputs, tokens)
    for got, a, b in zip(
        layer(x, w, dy, recipe), (cached, rows, columns), (weight, weight.t(), turned), strict=True
    ):
        exact, scale = a @ b.t(), a.abs() @ b.abs().t()
        assert got.dtype == torch.float32 and ((got - exact).abs() <= 2e-6 * scale + 1e-30).all()


@given(**CASES)
def test_the_three_products(tokens: int, inputs: int, outputs: int, name: str, seed: int) -> None:
    check(run, tokens, inputs, outputs, name, seed)


class _High(Recipe):
    """One product taken out of FP8."""

    out = ""

    def forward(self, x, weight, bias=None, counts=None):
        y, kept = super().forward(x, weight, bias, counts)
        return (PLAIN.forward(x, weight, bias, counts)[0] if self.out == "fprop" else y), (*kept, x)

    def gradient(self, grad, counts=None):
        return super().gradient(grad, counts), grad

    def input_gradient(self, grad, weight, kept, counts=None):
        if self.out == "dgrad":
            return PLAIN.input_gradient(grad[1], weight, kept, counts)
        return super().input_gradient(grad[0], weight, kept[:-1], counts)

    def weight_gradient(self, grad, kept, weight, counts=None):
        if self.out == "wgrad":
            return PLAIN.weight_gradient(grad[1], kept[-1:], weight, counts)
        return super().weight_gradient(grad[0], kept[:-1], weight, counts)


def without(product: str) -> Recipe:
    recipe = _High()
    object.__setattr__(recipe, "out", product)
    return recipe


@pytest.mark.parametrize("product", ["fprop", "dgrad", "wgrad"])
def test_the_check_rejects_a_product_that_is_not_fp8(product: str) -> None:
    cases = CASES | {"name": st.just("tile")}
    assert_rejects(lambda **case: check(lambda x, w, dy, r: run(x, w, dy, without(product)), **case), **cases)
    check(lambda x, w, dy, r: run(x, w, dy, without("")), 20, 48, 24, "tile", 0)


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=4), name=st.sampled_from(NAMED), seed=SEEDS)
def test_a_stack_is_its_layers_one_by_one(counts: list[int], name: str, seed: int) -> None:
    if name == "tensor":  # one scale for all experts' rows is another recipe than one for each
        name = "tile"
    recipe, draw = Recipe.named(name), torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 48, generator=draw, requires_grad=True)
    w = torch.randn(len(counts), 40, 48, generator=draw, requires_grad=True)
    dy = torch.randn(sum(counts), 40, generator=draw)
    y = stacked_linear(x, w, torch.tensor(counts), recipe)
    y.backward(dy)
    parts = zip(x.detach().split(counts), w.detach(), dy.split(counts), strict=True)
    made = [run(*part, recipe) for part in parts]
    torch.testing.assert_close(y, torch.cat([m[0] for m in made]))
    torch.testing.assert_close(x.grad, torch.cat([m[1] for m in made]))
    torch.testing.assert_close(w.grad, torch.stack([m[2] for m in made]))


def test_what_stays_in_high_precision_and_what_is_e5m6() -> None:
    tile, at = Recipe.named("tile"), "model.layers.3."
    for name in ("lm_head", at + "mlp.gate", at + "eh_proj"):
        assert tile.at(name) is PLAIN
    for name in (
        "mlp.gate_proj",
        "self_attn.q_a_proj",
        "mlp.experts.gate_up_proj",
        "mlp.shared_experts.down_proj",
    ):
        assert tile.at(at + name) is tile
    assert tile.at(at + "self_attn.o_proj").kept == "e5m6"
    assert Recipe.named("none") is PLAIN and tile.at("x").plain is tile.at("x").absorbs is False


def test_after_attention_twelve_bits_are_kept_and_used() -> None:
    recipe, x = Recipe.named("tile").at("model.layers.0.self_attn.o_proj"), torch.randn(40, 96)
    _, (packed, scales) = recipe.forward(x, torch.randn(32, 96))
    assert packed.dtype == torch.uint8 and packed.shape == (40, 144)
    assert (torch.frexp(scales).mantissa == 0.5).all()
    held = restored(Operand(unpack_e5m6(packed), scales))
    e4m3 = restored(along_rows(x, power_of_two=True))
    assert 4 * float((held - x).norm()) < float((e4m3 - x).norm())
    dy = torch.randn(40, 32)
    got = recipe.weight_gradient(recipe.gradient(dy), (packed, scales), torch.randn(32, 96))
    columns = along_columns(held, power_of_two=True)
    expected = module.products.wgrad(along_columns(dy), columns, torch.float32)
    assert torch.equal(got, expected)


def test_two_layers_on_one_input_share_what_is_kept() -> None:
    recipe, x = Recipe.named("tile"), torch.randn(4, 8, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        first = linear(x, torch.randn(64, 128, requires_grad=True), None, recipe)
        linear(x, torch.randn(32, 128, requires_grad=True), None, recipe)
        linear(x + 0, torch.randn(32, 128, requires_grad=True), None, recipe)
    kept = [t.data_ptr() for t in saved if t.dtype == torch.float8_e4m3fn]
    assert len(kept) == 3 and kept[0] == kept[1] != kept[2]
    assert not any(
        t.dtype == torch.float32 and t.shape == (32, 128) and t.data_ptr() == x.data_ptr() for t in saved
    )
    with torch.no_grad():
        x.add_(1)
    assert not torch.equal(linear(x, torch.eye(128), None, recipe)[..., :64], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    layer = Linear(48, 24).to(dtype)
    set_recipe(layer, Recipe.named("tile"))
    x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype and y.shape == (3, 5, 24)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe.named("fp4"), "none named 'fp4'; there are none, tensor, tile"),
        (lambda: Recipe(inputs="row"), "inputs is 'row', expected one of 'tile', 'block', 'tensor'"),
        (lambda: Recipe(weights="tile"), "weights is 'tile'"),
        (lambda: Recipe(mantissa_bits=4), "mantissa_bits is 4"),
        (lambda: Recipe(kept="bf16"), "kept is 'bf16'"),
    ],
)
def test_a_recipe_that_is_none_is_refused(make, message: str) -> None:
    with unchecked(), pytest.raises(ConfigError, match=message):
        make()


def test_a_device_without_fp8_units_is_refused(monkeypatch) -> None:
    Recipe.named("tile").refuse(torch.device("cpu"))
    monkeypatch.setattr(module, "has_fp8", lambda device: False)
    with pytest.raises(KernelError, match="recipe 'tile': cuda has no FP8 units"):
        Recipe.named("tile").refuse(torch.device("cuda"))


def test_nan_is_seen_and_stays_with_its_token() -> None:
    x = torch.randn(4, 128)
    x[2, 5] = torch.nan
    y = linear(x, torch.randn(16, 128), None, Recipe.named("tile"))
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()
