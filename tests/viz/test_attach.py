"""Watching other people's models: transformers' DeepSeek-V3, Mixtral and Qwen-MoE, and our own."""

import numpy as np
import pytest
import torch
from strategies import build, small, tokens
from torch import nn

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
