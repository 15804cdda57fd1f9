"""The linear seam: every product with a weight goes through a recipe, and its three products are counted apart."""

import importlib
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, small, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.errors import InputError
from dsv3lib.layers.experts import MLP
from dsv3lib.linear import PLAIN, Linear, PlainRecipe, linear, set_recipe, stacked_linear


class Counting(PlainRecipe):
    """Plain products, counted by place; while one runs, ``inside`` is set."""

    name, plain = "counting", False

    def __init__(self, place: str = "", counts: Counter | None = None, state: dict | None = None) -> None:
        self.place = place
        self.counts = Counter() if counts is None else counts
        self.state = {"inside": False} if state is None else state

    def at(self, name: str) -> PlainRecipe:
        return Counting(name, self.counts, self.state)

    def _count(self, product, *call):
        self.counts[product.__name__, self.place] += 1
        self.state["inside"] = True
        try:
            return product(*call)
        finally:
            self.state["inside"] = False

    def forward(self, *call):
        return self._count(super().forward, *call)

    def input_gradient(self, *call):
        return self._count(super().input_gradient, *call)

    def weight_gradient(self, *call):
        return self._count(super().weight_gradient, *call)

    def of(self, product: str) -> Counter:
        return Counter({place: n for (kind, place), n in self.counts.items() if kind == product})


class Products(TorchDispatchMode):
    """Refuses a matrix product that touches a weight's memory while no recipe is at work."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mv", "dot", "addmv")

    def __init__(self, model: DeepSeekV3, recipe: Counting) -> None:
        super().__init__()
        self.recipe = recipe
        wide = [p for p in model.parameters() if p.ndim > 1]
        self.weights = {p.untyped_storage().data_ptr() for p in wide}
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.NAMES:
            operands = [a for a in args if isinstance(a, torch.Tensor)]
            if any(a.untyped_storage().data_ptr() in self.weights for a in operands):
                self.seen += 1
                assert self.recipe.state["inside"], f"{func} multiplies by a weight beside the recipe"
        return func(*args, **(kwargs or {}))


def places(config: ModelConfig, mtp: bool) -> set[str]:
    """Every product with a weight, by its place."""
    own = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    own = [f"self_attn.{n}" for n in (*own, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    dense = [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    mixture = ["mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    mixture += [f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")]
    found = {"lm_head"}
    for layer in range(config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)):
        names = own + (dense if layer < config.first_k_dense_replace else mixture)
        names += ["eh_proj"] if layer >= config.num_hidden_layers else []
        found |= {f"model.layers.{layer}.{n}" for n in names}
    return found


@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(config=configs(), seed=SEEDS)
def test_all_products_with_weights_go_through_the_recipe(config: ModelConfig, seed: int) -> None:
    """Forward, input-gradient and weight-gradient products of training, each counted; and those of decoding."""
    model, recipe = build(config, seed, torch.float64), Counting()
    plain = build(config, seed, torch.float64)
    set_recipe(model, recipe)
    ids = tokens(config, 2, 6, seed)
    with Products(model, recipe) as products:
        out = model(ids, labels=ids)
        out.loss.backward()
    expected = Counter(dict.fromkeys(places(config, mtp=True), 1))
    expected["lm_head"] = 1 + config.num_nextn_predict_layers
    for product in ("forward", "input_gradient", "weight_gradient"):
        assert recipe.of(product) == expected, product
    assert products.seen >= 2 * sum(expected.values())  # forward and input gradients read a weight
    want = plain(ids, labels=ids)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)

    recipe.counts.clear()
    with torch.no_grad(), Products(model, recipe):
        cache = LatentCache(config)
        model(ids, cache=cache)
        got = model(ids[:, :1], cache=cache).logits
        whole = plain(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    torch.testing.assert_close(got[:, 0], whole, rtol=1e-9, atol=1e-9)
    assert recipe.of("forward").keys() == places(config, mtp=False)


def test_a_product_beside_the_recipe_is_seen() -> None:
    model, recipe = build(small()), Counting()
    set_recipe(model, recipe)
    ids = tokens(model.config, 1, 4)
    beside = lambda self, x: self.down_proj(x @ self.gate_proj.weight.T * self.up_proj(x))  # noqa: E731
    with mock.patch.object(MLP, "forward", beside), Products(model, recipe):
        with pytest.raises(AssertionError, match="multiplies by a weight beside the recipe"):
            model(ids)


def test_the_model_takes_a_recipe_and_copies_keep_it() -> None:
    recipe = Counting()
    model = DeepSeekV3(small(), recipe=recipe)
    assert model.recipe is recipe and model.lm_head.recipe.place == "lm_head"
    assert model.model.layers[1].mlp.experts.down_recipe.place == "model.layers.1.mlp.experts.down_proj"
    assert not any("recipe" in name for name in model.state_dict())
    assert DeepSeekV3(small()).recipe is PLAIN


@given(data=st.data(), seed=SEEDS)
def test_a_stack_is_its_matrices_one_by_one(data, seed: int) -> None:
    """Groups of any size, empty ones too; all three gradients."""
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    x, weight = draw(sum(sizes), 3), draw(len(sizes), 2, 3)
    y = stacked_linear(x, weight, torch.tensor(sizes))
    parts = [a @ w.T for a, w in zip(x.split(sizes), weight, strict=True)]
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected)
    towards = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    for a, b in zip(*(torch.autograd.grad(z, (x, weight), towards) for z in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="counts: they sum to 3, expected 4"):
        stacked_linear(torch.zeros(4, 2), torch.zeros(2, 3, 2), torch.tensor([1, 2]))


def test_a_recipe_under_autocast_and_with_a_bias() -> None:
    layer, x = Linear(6, 5), torch.randn(2, 3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, layer.weight, layer.bias, Counting()).dtype == torch.bfloat16
    y = linear(x, layer.weight, layer.bias, Counting())
    assert y.shape == (2, 3, 5) and torch.equal(y, layer(x))
    grads = torch.autograd.grad(y.sin().sum(), (x, layer.weight, layer.bias))
    expected = torch.autograd.grad(layer(x).sin().sum(), (x, layer.weight, layer.bias))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("costs", "forward_flops"), ("inputs", "check_inputs"), ("outputs", "ModelOutput"),
        ("layers.traffic", "count_traffic"), ("layers.variants", "GroupedQueryAttention"),
    ],
)  # fmt: skip
def test_moved_modules_are_found_under_their_old_names_with_a_warning(old: str, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(f"dsv3lib.{old}")
        importlib.reload(module)
    assert callable(getattr(module, name))
    assert any("has moved to dsv3lib." in str(w.message) and w.category is DeprecationWarning for w in caught)
