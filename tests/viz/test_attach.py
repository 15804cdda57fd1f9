"""Watching other people's models: transformers' DeepSeek-V3, Mixtral and Qwen-MoE, and our own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, small, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsv3lib.errors import InputError
from dsv3lib.viz.expert_load import ExpertLoad

IDS = torch.arange(24).view(2, 12)


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = small(num_nextn_predict_layers=0).to_dict()
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**{k: v for k, v in fields.items() if k != "architectures"})
    )


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=6, num_experts_per_tok=3,
        )
    )  # fmt: skip


def qwen():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
            shared_expert_intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, num_experts=5,
            num_experts_per_tok=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "layers", "experts", "per_token"), [(deepseek, 1, 8, 3), (mixtral, 2, 6, 3), (qwen, 2, 5, 2)]
)
def test_routing_is_recorded_and_outputs_are_what_they_were(make, layers, experts, per_token):
    model = make().eval()
    with torch.no_grad():
        before = model(IDS).logits
        view = ExpertLoad.attach(model)
        with view.domain("first"):
            watched = model(IDS).logits
        with view.domain("second"):
            model(IDS[:1])
    assert torch.equal(before, watched)
    load = view.history.load
    assert load.shape == (2, layers, experts)
    assert (load.sum(-1) == [[24 * per_token] * layers, [12 * per_token] * layers]).all()
    assert (view.history.by_domain[0, 0] == load[0]).all() and view.history.by_domain[0, 1].sum() == 0
    assert (view.history.by_domain[1, 1] == load[1]).all()
    view.detach()
    view.detach()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert len(view.history) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_deepseeks_counts_are_our_own_models():
    """The same weights, once in transformers' model watched by hooks, once in ours that says it itself."""
    ours = build(small(num_nextn_predict_layers=0)).eval()
    theirs = deepseek().eval()
    theirs.load_state_dict(_translated(ours), strict=True)
    view, own = ExpertLoad.attach(theirs), ExpertLoad.attach(ours)
    with torch.no_grad():
        theirs(IDS)
        out = ours(IDS)
    assert np.array_equal(view.history.load, own.history.load)
    assert np.array_equal(own.history.load[0], out.expert_load.numpy())
    assert view.history.groups == own.history.groups == 4


def _translated(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("rope")}


def test_gradients_are_what_they_were_and_recomputation_counts_once():
    model = mixtral()
    model.activation_checkpointing_enable()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    view = ExpertLoad.attach(model)
    model(IDS, labels=IDS).loss.backward()
    for now, then in zip([p.grad for p in model.parameters() if p.grad is not None], plain, strict=True):
        assert torch.equal(now, then)
    assert len(view.history) == 1 and (view.history.load.sum(-1) == 24 * 3).all()


@settings(max_examples=8)
@given(
    make=st.sampled_from([deepseek, mixtral]), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    left=st.booleans(), whole=st.sampled_from([None, "reentrant", "not reentrant"]), layers=st.booleans(),
    by_name=st.booleans(),
)  # fmt: skip
def test_tokens_are_counted_once_and_padding_never(make, lengths, left, whole, layers, by_name):
    """Rows padded on either side; layers or the whole model run again during backward."""
    model, width = make().train(), max(lengths)
    ids = torch.randint(1, 50, (len(lengths), width))
    places = torch.arange(width)
    rows = [places >= width - n if left else places < n for n in lengths]
    mask = torch.stack(rows).long()
    if layers:
        model.activation_checkpointing_enable()
    view = ExpertLoad.attach(model)

    def run(ids, mask):
        return (model(ids, attention_mask=mask) if by_name else model(ids, mask)).logits.sum()

    if whole is None:
        run(ids, mask).backward()
    else:
        start = ids if whole == "not reentrant" else ids.clone()
        weight = torch.ones(1, requires_grad=True)
        total = checkpoint(
            lambda i, m, w: run(i, m) * w, start, mask, weight, use_reentrant=whole == "reentrant"
        )
        total.sum().backward()
    per_token = model.config.num_experts_per_tok
    assert len(view.history) == 1
    assert (view.history.load.sum(-1) == sum(lengths) * per_token).all()
    view.detach()
    if not left:  # and it is each row's own load: padding behind a row changes nothing in it
        alone = ExpertLoad.attach(model)
        for row, n in zip(ids, lengths, strict=True):
            model(row[None, :n])
        assert np.array_equal(alone.history.load.sum(0), view.history.load[0])
        alone.detach()


def test_padding_is_not_counted_while_generating():
    """From the second token on the mask is longer than what is new."""
    model, lengths = mixtral().eval(), [4, 2]
    ids, mask = torch.randint(3, 50, (2, 4)), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    view = ExpertLoad.attach(model)
    model.generate(
        ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert (view.history.load[0].sum(-1) == sum(lengths) * 3).all()
    assert (view.history.load[1:].sum(-1) == 2 * 3).all() and len(view.history) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_our_own_model_run_again_during_backward_is_counted_once(reentrant):
    model, ids = build(small()), tokens(small(), 2, 7)
    view, weight = ExpertLoad.attach(model), torch.ones(1, requires_grad=True)
    checkpoint(lambda i, w: model(i, labels=i).loss * w, ids, weight, use_reentrant=reentrant).sum().backward()
    assert len(view.history) == 1


def test_our_own_model_with_its_mtp_module():
    config = small()
    model, ids = build(config), tokens(small(), 2, 7)
    view = ExpertLoad.attach(model)
    out = model(ids, labels=ids)
    assert view.history.layers == ["layer 1", "MTP 1"]
    assert np.array_equal(view.history.load[0], out.expert_load.numpy())


def test_a_model_without_experts_is_refused_in_words():
    with pytest.raises(InputError, match="Sequential has 0 modules named 'experts'"):
        ExpertLoad.attach(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="attached to no model"):
        with ExpertLoad.of_model(small()).domain("code"):
            pass
