"""A whole model in FP8: every product of every listed layer is counted, and none may be missing."""

import pytest
import torch
from strategies import build, small, tokens

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.fp8 import Recipe, products
from dsv3lib.fp8.activations import activation_bytes
from dsv3lib.fp8.effect import effects, relative_error, using
from dsv3lib.fp8.outliers import with_outliers
from dsv3lib.linear import PLAIN, DeferredWeightGradients, Linear, set_recipe

CONFIG = small(num_nextn_predict_layers=1)
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")
BLOCKS = CONFIG.num_hidden_layers + CONFIG.num_nextn_predict_layers
LISTED = BLOCKS * len(ATTENTION) + BLOCKS * len(
    NETWORK
)  # of a dense block its network, of the others the shared expert
STACKED = 2 * len(CONFIG.moe_layers)


@pytest.fixture
def counted(monkeypatch) -> dict[str, list[torch.Size]]:
    """Counts what reaches the FP8 products, and refuses operands that are not E4M3."""
    found: dict[str, list] = {"matrix": [], "grouped": [], "grouped_wgrad": []}
    for name, kind in (
        ("gemm_fp8", "matrix"), ("grouped_gemm_fp8_ref", "grouped"), ("grouped_wgrad_fp8_ref", "grouped_wgrad"),
    ):  # fmt: skip
        plain = getattr(products, name)

        def counting(a, a_scales, b, *rest, plain=plain, kind=kind):
            assert a.dtype == b.dtype == torch.float8_e4m3fn
            found[kind].append((a.shape, b.shape))
            return plain(a, a_scales, b, *rest)

        monkeypatch.setattr(products, name, counting)
    return found


def step(model: DeepSeekV3) -> None:
    ids = tokens(model.config, 2, 12)
    model(ids, labels=ids).loss.backward()


def check_counts(model: DeepSeekV3, found: dict[str, list]) -> None:
    step(model)
    assert len(found["matrix"]) == 3 * LISTED
    assert len(found["grouped"]) == 2 * STACKED and len(found["grouped_wgrad"]) == STACKED


@pytest.mark.parametrize("name", ["tile", "tensor", "tile+block_gradients"])
def test_all_three_products_of_every_layer_are_fp8(counted, name: str) -> None:
    model = DeepSeekV3(CONFIG, torch.Generator().manual_seed(0), recipe=Recipe.named(name))
    linears = [n for n, m in model.named_modules() if isinstance(m, Linear) and m.recipe is not PLAIN]
    assert len(linears) == LISTED and not any("lm_head" in n or "eh_proj" in n for n in linears)
    check_counts(model, counted)


ORIGINAL = {n: getattr(products, n) for n in ("gemm_fp8", "grouped_gemm_fp8_ref", "grouped_wgrad_fp8_ref")}


@pytest.mark.parametrize("product", ["forward", "forward_gated", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_count_fails_when_one_product_is_taken_out(
    counted, monkeypatch, product: str, stacked: bool
) -> None:
    """Wgrad's too: its product goes past the counted FP8 ones, as one in high precision would."""
    plain = getattr(Recipe, product)

    def in_high_precision(self, *given, **more):
        is_stack = any(isinstance(x, torch.Tensor) and x.dtype == torch.int64 for x in given)
        if is_stack != stacked:
            return plain(self, *given, **more)
        with monkeypatch.context() as context:
            for name in ("gemm_fp8", "grouped_gemm_fp8_ref", "grouped_wgrad_fp8_ref"):
                context.setattr(products, name, ORIGINAL[name])
            return plain(self, *given, **more)

    monkeypatch.setattr(Recipe, product, in_high_precision)
    model = DeepSeekV3(CONFIG, torch.Generator().manual_seed(0), recipe=Recipe.named("tile"))
    with pytest.raises(AssertionError):
        check_counts(model, counted)


def test_deferred_weight_gradients_are_the_same_to_the_bit() -> None:
    model, recipe = build(CONFIG), Recipe.named("tile")
    set_recipe(model, recipe)
    step(model)
    at_once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    deferred = DeferredWeightGradients(recipe)
    set_recipe(model, deferred)
    step(model)
    assert model.model.layers[1].mlp.experts.down_proj.grad is None
    deferred.take().run()
    assert all(torch.equal(at_once[n], p.grad) for n, p in model.named_parameters() if n in at_once)


def test_swiglu_s_output_is_made_again_from_its_cached_inputs() -> None:
    """The gated product's gradients are autograd's own at the cached inputs."""
    recipe, draw = Recipe.named("tile"), torch.Generator().manual_seed(1)
    gate, up, w = (torch.randn(s, generator=draw) for s in ((20, 64), (20, 64), (32, 64)))
    y, kept = recipe.forward_gated(gate, up, w)
    assert [t.dtype for t in kept] == [torch.float8_e4m3fn, torch.float32] * 2
    held = [(v.float() * s).requires_grad_() for v, s in (kept[:2], kept[2:])]
    grad = torch.randn(20, 64, generator=draw)
    (torch.nn.functional.silu(held[0]) * held[1]).backward(grad)
    for got, one in zip(recipe.gate_gradients(grad, kept), held, strict=True):
        torch.testing.assert_close(got, one.grad)
    hidden = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(y, recipe.forward(hidden, w)[0])


def test_a_hooked_layer_is_still_called() -> None:
    model = DeepSeekV3(CONFIG, torch.Generator().manual_seed(0), recipe=Recipe.named("tile"))
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _m, given: seen.append(given[0].shape)
    )
    step(model)
    assert len(seen) == 1


def test_the_effect_of_a_recipe_on_one_batch() -> None:
    model = build(CONFIG)
    ids = tokens(CONFIG, 2, 24)
    tile = Recipe.named("tile")
    found = effects(model, ids, {"none": PLAIN, "tile": tile, "one bit": tile.coarser(1)})
    assert found["none"].loss_error == 0 and found["none"].cosine["all"] == pytest.approx(1)
    assert 0 < abs(found["tile"].loss_error) < 0.05
    assert found["one bit"].cosine["attention"] < found["tile"].cosine["attention"] < 1
    assert set(found["tile"].by_layer) == {"layer 0", "layer 1", "layer 2"}
    assert all(p.grad is None for p in model.parameters())
    assert relative_error([9.0, 2.0, 2.2], [9.0, 2.0, 2.0]) == pytest.approx(0.05)


def test_planted_outliers_hurt_one_scale_for_all_and_not_tiles() -> None:
    config = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=0, num_hidden_layers=2)
    model = build(config)
    ids = tokens(config, 1, 32)
    plain = with_outliers(PLAIN, 1e6, 8)
    found = effects(
        model, ids, {n: with_outliers(Recipe.named(n), 1e6, 8) for n in ("tile", "tensor")}, plain
    )
    assert found["tensor"].cosine["all"] < 0.3 and found["tile"].cosine["all"] > 0.6


def test_fewer_bytes_are_kept() -> None:
    config = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=0, num_hidden_layers=2)
    model = build(config)
    ids = tokens(config, 1, 64)
    before = activation_bytes(model, ids)
    with using(model, Recipe.named("tile")):
        after = activation_bytes(model, ids)
    assert after["experts"] < 0.6 * before["experts"]
    assert after["shared and dense"] < 0.4 * before["shared and dense"]
    assert after["head"] == before["head"] > 0 and not model._forward_hooks
