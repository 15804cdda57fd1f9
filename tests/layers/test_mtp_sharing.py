"""Embedding and head are shared: each use counts once in their gradients. Two layouts, two norms: what they change."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs, small, tokens

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.model import next_token_loss
from dsv3lib.studies import mtp_ways

SHARED = {"config": configs(mtp=(1, 3)), "seed": SEEDS, "length": st.integers(5, 8)}


# ---- gradients of what is shared --------------------------------------------------------------------------


def copies_gradient(model: DeepSeekV3, ids: torch.Tensor, weights: list[float]) -> tuple[torch.Tensor, ...]:
    """Gradients of embedding and head as sums over copies, one for each use: the chain, written out.

    The main model has a pair of its own, and so has each depth; use by use, none can be counted twice.
    """
    depths = model.config.num_nextn_predict_layers
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    tables = [embed.detach().clone().requires_grad_() for _ in range(depths + 1)]
    heads = [head.detach().clone().requires_grad_() for _ in range(depths + 1)]
    step = model.begin(ids)
    hidden, _ = model.model(F.embedding(ids, tables[0]), step)
    losses = [next_token_loss(F.linear(hidden, heads[0]), ids, 1)]
    for k, module in enumerate(model.model.layers[model.model.n_main :], start=1):
        seen = F.embedding(ids[:, k:], tables[k])
        step = model.begin(ids[:, k:])
        hidden, _ = module.advance(hidden[:, :-1], seen, step)
        losses.append(next_token_loss(F.linear(hidden, heads[k]), ids, k + 1))
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    found = torch.autograd.grad(total, [*tables, *heads])
    return sum(found[: depths + 1]), sum(found[depths + 1 :])


def check_counted_once(config: ModelConfig, seed: int, length: int, scale: float = 1.0) -> None:
    """``scale`` counts the depths' uses more than once: what a wrong implementation would do."""
    model = build(config, seed, torch.float64)
    model.aux_loss_alpha = 0.0
    ids = tokens(config, 2, length, seed)
    model(ids, labels=ids).loss.backward()
    depths = config.num_nextn_predict_layers
    weights = [1.0, *[scale * model.mtp_loss_weight / depths] * depths]
    of_embedding, of_head = copies_gradient(model, ids, weights)
    if config.tie_word_embeddings:  # one matrix, and all its uses
        of_embedding = of_head = of_embedding + of_head
    for parameter, gradient in (
        (model.model.embed_tokens.weight, of_embedding),
        (model.lm_head.weight, of_head),
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@settings(max_examples=8)
@given(**SHARED)
def test_each_use_of_embedding_and_head_counts_once(config: ModelConfig, seed: int, length: int) -> None:
    check_counted_once(config, seed, length)


def test_the_check_rejects_uses_counted_twice() -> None:
    assert_rejects(lambda **case: check_counted_once(**case, scale=2.0), examples=3, **SHARED)


# ---- the order of eh_proj's halves ------------------------------------------------------------------------


def swap_halves(model: DeepSeekV3) -> None:
    """Lay every module's projection the other way round, as Eq. 21 has it."""
    with torch.no_grad():
        for module in model.model.layers[model.model.n_main :]:
            module.eh_proj.weight.copy_(module.eh_proj.weight.roll(model.config.hidden_size, 1))


def test_the_order_of_the_halves_is_layout_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both moved: the same numbers. One moved (a file read the wrong way round): others, and no error."""
    config = small(num_nextn_predict_layers=2)
    model = build(config, dtype=torch.float64)
    ids = tokens(config, 2, 8)
    before = model(ids, return_mtp=True)
    swap_halves(model)
    wrong = model(ids, return_mtp=True)
    kind = type(model.model.layers[-1])
    right = kind._join
    monkeypatch.setattr(kind, "_join", lambda *given: right(*given).roll(config.hidden_size, -1))
    both = model(ids, return_mtp=True)
    for a, b, c in zip(before.mtp_logits, both.mtp_logits, wrong.mtp_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert (a - c).abs().max() > 1e-2
    assert torch.equal(before.logits, wrong.logits), "the main model does not notice"


# ---- the hidden state that is handed on -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chain", "before_norm"])
def test_with_gains_of_one_both_states_are_the_same_to_the_next_module(kind: str) -> None:
    """``hnorm`` normalises again, so what was handed on differs by the former norm's gain and by nothing else."""
    model = mtp_ways.model_of(0).double()
    ids = torch.randint(256, (2, 12))
    plain = [one.detach() for one in mtp_ways.depth_logits(model, ids, kind)[0]]
    library = model(ids, return_mtp=True)
    for mine, own in zip(plain, [library.logits, *library.mtp_logits], strict=True):
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-4)  # but for eps, which is added twice
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.2, 2.0)
    library = model(ids, return_mtp=True)
    gained = mtp_ways.depth_logits(model, ids, kind)[0][1]
    close = torch.allclose(gained, library.mtp_logits[0], rtol=0, atol=1e-3)
    assert close == (kind == "chain")


@pytest.mark.parametrize("depth", [1, 2])
def test_an_independent_head_sees_no_further_token(depth: int) -> None:
    model = mtp_ways.model_of(0).double()
    ids = torch.randint(256, (1, 9))
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 256
    for kind, blind in (("heads", 6), ("chain", 6 - depth)):
        a, b = (mtp_ways.depth_logits(model, x, kind)[0][depth][0] for x in (ids, other))
        moved = (a - b).abs().amax(-1) > 1e-9
        assert not moved[:blind].any() and moved[blind], kind


def test_sums_are_right_and_unseen_pairs_stay_unseen() -> None:
    generator = torch.Generator().manual_seed(0)
    for unseen in (False, True):
        for row in mtp_ways.sums(5, 20, unseen, generator).tolist():
            for one in bytes(row).decode().split(";")[:-1]:
                a, b, c = int(one[:2]), int(one[3:5]), int(one[6:])
                assert a + b == c and ((a + 3 * b) % 5 == 0) == unseen
