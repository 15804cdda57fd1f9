"""A score taken apart is put together again: content and position add up to what attention computes."""

import torch
from strategies import build, small, tokens

from dsv3lib.layers.attention import causal_mask
from dsv3lib.studies.head_scores import head_scores


def test_parts_add_up_to_the_scores_that_attention_softmaxes() -> None:
    config = small(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
    model, ids = build(config).eval(), tokens(config, 2, 9)
    parts = head_scores(model, ids, distances=5)
    assert parts.content.shape == parts.position.shape == (2, 3, 5)
    block, kept = model.model.layers[0].self_attn, {}
    for name in ("q_b_proj", "kv_a_layernorm", "kv_a_proj_with_mqa"):
        getattr(block, name).register_forward_hook(lambda m, g, out, name=name: kept.update({name: out}))
    with torch.no_grad():
        model(ids)
    turns = model.rope.table(9, model.lm_head.weight)
    q = kept["q_b_proj"].view(2, 9, 3, config.qk_head_dim)
    up = block.kv_b_proj.weight.view(3, -1, config.kv_lora_rank)[:, : config.qk_nope_head_dim]
    scores = torch.zeros(3, 9, 9)
    for row in range(2):
        for t in range(9):
            for j in range(t + 1):
                for head in range(3):
                    content = q[row, t, head, : config.qk_nope_head_dim] @ (up[head] @ kept["kv_a_layernorm"][row, j])
                    turned = torch.view_as_complex(q[row, t, head, config.qk_nope_head_dim :].reshape(-1, 2)) * turns[t]
                    key = kept["kv_a_proj_with_mqa"][row, j, config.kv_lora_rank :].reshape(-1, 2)
                    position = (turned * (torch.view_as_complex(key) * turns[j]).conj()).real.sum()
                    scores[head, t, j] += (content + position).detach() * config.softmax_scale / 2
    means = torch.stack([scores.diagonal(-d, dim1=1, dim2=2).mean(-1) for d in range(5)], -1)
    torch.testing.assert_close(parts.content[0] + parts.position[0], means, rtol=1e-4, atol=1e-5)
    assert causal_mask(9, 9, torch.device("cpu")).sum() == 45  # the pairs that were added up


def test_shares_of_pairs_sum_to_one_and_find_the_pair_that_matters() -> None:
    config = small(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0, qk_rope_head_dim=6)
    model = build(config)
    with torch.no_grad():  # only the second pair of the shared key is left
        rows = model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight[config.kv_lora_rank :]
        rows[:2].zero_(), rows[4:].zero_()
    shares = head_scores(model.eval(), tokens(config, 3, 20), distances=15).pair_share
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 3))
    torch.testing.assert_close(shares[0, :, 1], torch.ones(3))
