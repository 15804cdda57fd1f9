"""One token at a time, the few operations against the plain layers."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.backends import one_token
from dsv3lib.backends.choice import Choice, is_one_token
from dsv3lib.backends.one_token import OneToken, route_one
from dsv3lib.errors import InputError
from dsv3lib.layers.router import route
from dsv3lib.layers.step import Step
from dsv3lib.rope_settings import YarnScaling

NANO = ModelConfig.preset("nano")
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
CONFIGS = {
    "nano": NANO,
    "without q_lora": NANO.replace(q_lora_rank=None),
    "biases": NANO.replace(attention_bias=True),
    "yarn": NANO.replace(rope_scaling=YARN, max_position_embeddings=256),
    "one group, plain weights": NANO.replace(n_group=1, topk_group=1, norm_topk_prob=False),
    "all dense": NANO.replace(first_k_dense_replace=NANO.num_hidden_layers),
    "two shared experts": NANO.replace(n_shared_experts=2),
}


def awake(config: ModelConfig, dtype: torch.dtype) -> DeepSeekV3:
    """A model in which nothing is zero or one: routing biases, linear biases and norms drawn at random."""
    generator = torch.Generator().manual_seed(1)
    model = DeepSeekV3(config, generator=generator).to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "bias")):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif tensor.ndim > 1:
                tensor.mul_(5.0)  # the initialiser's deviation leaves small logits
    return model


@torch.inference_mode()
def walk(model: DeepSeekV3, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, list, LatentCache]:
    """Logits and chosen experts of a prompt and then token after token."""
    cache = LatentCache(model.config, capacity=4)
    outs = [model(ids[:, :prompt], cache=cache)]
    outs += [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, ids.shape[1])]
    return torch.cat([o.logits for o in outs], 1), [o.expert_indices for o in outs], cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_equals_the_plain_layers(name, dtype, tolerance, monkeypatch) -> None:
    model = awake(CONFIGS[name], dtype)
    ids = torch.randint(model.config.vocab_size, (1, 12))
    fast, experts, cache = walk(model, ids, 5)
    monkeypatch.setattr(Choice, "one_token", lambda *_: None)
    plain, plain_experts, plain_cache = walk(model, ids, 5)
    torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance)
    for a, b in zip(experts, plain_experts, strict=True):
        assert [None if x is None else x.tolist() for x in a] == [
            None if x is None else x.tolist() for x in b
        ]
    for a, b in zip(cache._buffers, plain_cache._buffers, strict=True):
        torch.testing.assert_close(a[:, :12], b[:, :12], rtol=0, atol=tolerance)


def test_a_wrong_operation_would_show(monkeypatch) -> None:
    model = awake(NANO, torch.float64)
    ids = torch.randint(model.config.vocab_size, (1, 8))
    right, _, _ = walk(model, ids, 5)
    monkeypatch.setattr(one_token, "rotated", lambda x, rotation: x)  # no RoPE
    wrong, _, _ = walk(model, ids, 5)
    assert torch.equal(right[:, :5], wrong[:, :5])
    assert (right - wrong)[:, 5:].abs().max() > 1e-6


def test_is_taken_for_one_cached_token_in_inference_only(monkeypatch) -> None:
    cache = LatentCache(NANO)
    x = torch.zeros(1, 1, NANO.hidden_size)
    rotations = torch.zeros(1, NANO.qk_rope_head_dim // 2, dtype=torch.complex64)
    with torch.no_grad():
        cache.plan(1, 40)
        cache.advance(40)
        step = Step(rotations, cache=cache)
        assert is_one_token(x, step, NANO)
        assert not is_one_token(x.expand(2, 1, -1), step, NANO)
        assert not is_one_token(x.expand(1, 2, -1), step, NANO)
        assert not is_one_token(x, Step(rotations), NANO)
        assert not is_one_token(x, Step(rotations, cache=cache, lengths=torch.tensor([1])), NANO)
    assert not is_one_token(x, step, NANO)  # gradients are wanted


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 7), (torch.float64, 7), (torch.bfloat16, 0)])
def test_takes_each_token_behind_the_prompt(dtype, tokens, monkeypatch) -> None:
    model, taken = awake(NANO, dtype), []
    forward = OneToken.forward
    monkeypatch.setattr(OneToken, "forward", lambda *call: taken.append(1) or forward(*call))
    walk(model, torch.randint(model.config.vocab_size, (1, 12)), 5)
    assert len(taken) == tokens


@given(data=st.data())
def test_routes_as_the_router_does(data) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]))
    config = NANO.replace(
        n_routed_experts=8, n_group=groups, topk_group=data.draw(st.integers(1, groups)),
        num_experts_per_tok=data.draw(st.integers(1, 2)), norm_topk_prob=data.draw(st.booleans()),
    )  # fmt: skip
    # Multiples of 1/8 are exact in FP32 as in Python, and often equal: ties must be settled alike.
    eighths = st.integers(0, 8).map(lambda n: n / 8)
    scores = data.draw(st.lists(eighths, min_size=8, max_size=8))
    bias = data.draw(st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=8, max_size=8))
    indices, weights = route(torch.tensor([scores]), torch.tensor(bias), config)
    chosen, gates = route_one(scores, bias, config)
    assert chosen == indices[0].tolist()
    torch.testing.assert_close(torch.tensor(gates), weights[0])


def test_a_spoilt_model_is_refused() -> None:
    with pytest.raises(InputError, match="1 of 8 are NaN"):
        route_one([0.5] * 7 + [float("nan")], [0.0] * 8, NANO.replace(n_routed_experts=8))


def one_more(model: DeepSeekV3, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, which goes through alone."""
    return walk(model, ids, ids.shape[1] - 1)[0][:, -1]


MOVES = {
    "cast": lambda model: model.double().float(),
    "changed in place": lambda model: [p.data.mul_(1.01) for p in model.parameters()],
    "data replaced": lambda model: [setattr(p, "data", p.data * 1.01) for p in model.parameters()],
    "assigned": lambda model: model.load_state_dict(
        {k: v * 1.01 for k, v in model.state_dict().items()}, assign=True
    ),
    "a layer replaced": lambda model: setattr(
        model.model.layers[0], "mlp", copy.deepcopy(model.model.layers[1].mlp)
    ),
    "the head replaced": lambda model: setattr(
        model, "lm_head", torch.nn.Linear(NANO.hidden_size, NANO.vocab_size, bias=False)
    ),
    "a bias moved": lambda model: model.routers()[0].e_score_correction_bias.add_(torch.linspace(-1, 1, 8)),
}


@pytest.mark.parametrize("name", MOVES)
def test_sees_weights_that_change(name, monkeypatch) -> None:
    model = awake(NANO, torch.float32)
    assert NANO.n_routed_experts == 8
    ids = torch.randint(model.config.vocab_size, (1, 40))
    before = one_more(model, ids)
    with torch.no_grad():
        MOVES[name](model)
    after = one_more(model, ids)
    monkeypatch.setattr(Choice, "one_token", lambda *_: None)
    torch.testing.assert_close(after, one_more(model, ids), rtol=0, atol=1e-4)
    if name != "cast":
        assert not torch.equal(before, after)


def test_a_copy_has_its_own_weights() -> None:
    model = awake(NANO, torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, 40))
    expected = one_more(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert torch.equal(one_more(twin, ids), expected)


@given(
    heads=st.integers(1, 5), width=st.integers(2, 40), pieces=st.integers(0, 3), left=st.integers(-2, 2),
    loud=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_attends_in_pieces_as_in_one(heads, width, pieces, left, loud, seed) -> None:
    length = max(1, pieces * max(one_token.PIECE_LEAST, one_token.PIECE_VALUES // width) + left)
    generator = torch.Generator().manual_seed(seed)
    q, past = (torch.randn(n, width, dtype=torch.float64, generator=generator) for n in (heads, length))
    if loud:
        q *= 1e3  # exp would overflow without the maximum
    rank = max(1, width - 4)
    expected = torch.softmax(q @ past.T, -1) @ past[:, :rank]
    found = one_token.attend_to_latents(q.numpy(), past.numpy(), rank)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-9 if loud else 1e-12)


def test_the_same_bits_every_time() -> None:
    model = awake(NANO, torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, 40))
    assert torch.equal(one_more(model, ids), one_more(model, ids))
