"""What a context costs: the count against a count of every product that is taken, and the log's lines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsv3lib import ModelConfig
from dsv3lib.layers.attention import MultiHeadLatentAttention
from dsv3lib.studies import context_cost as study
from dsv3lib.studies.log import read

TINY = ModelConfig.preset("nano").replace(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)


@settings(max_examples=15)
@given(
    context=st.integers(1, 40),
    phase=st.sampled_from(["decode", "prefill"]),
    form=st.sampled_from(["expanded", "absorbed"]),
)
def test_the_count_is_what_the_products_take(context: int, phase: str, form: str) -> None:
    """torch counts a masked score like any other, so prefill's whole square is counted there."""
    layer = MultiHeadLatentAttention(TINY, layer=0)
    new = 1 if phase == "decode" else context
    q = torch.randn(1, TINY.num_attention_heads, new, TINY.qk_head_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(layer, form)(q, torch.randn(1, context, TINY.latent_dim))
    core = study.counted(TINY, "decode", form, context) - study.counted(TINY, "decode", form, 0)
    up = 2 * TINY.num_attention_heads * TINY.kv_lora_rank * (TINY.qk_nope_head_dim + TINY.v_head_dim)
    pair = core // context - (up if form == "expanded" else 0)
    masked = new * context - (1 if phase == "decode" else context * (context + 1) // 2)
    wasted = masked * pair if phase == "prefill" else 0
    assert counter.get_total_flops() == study.counted(TINY, phase, form, context) + wasted


def test_at_v3_s_sizes_the_figures_are_the_paper_s() -> None:
    config = study.one_layer()
    per_token = study.counted(config, "decode", "absorbed", 2) - study.counted(config, "decode", "absorbed", 1)
    assert per_token == 278_528 and study.counted(config, "decode", "expanded", 1) == 33_636_352
    assert study.run("decode", "absorbed", 10**6)["cache_bytes"] == 576 * 4 * 10**6
    whole = study.context_free_flops(config) + study.counted(config, "prefill", "expanded", 1)
    assert whole == 2 * 187_105_280 + 2 * 128 * (192 + 128)  # of one token: every weight of the layer, and itself


def test_prefill_grows_with_the_square_and_decode_does_not() -> None:
    config = study.one_layer()
    for phase, growth in (("decode", 2.0), ("prefill", 4.0)):
        form = "absorbed" if phase == "decode" else "expanded"
        short, long = (study.counted(config, phase, form, n) for n in (2**17, 2**18))
        assert long / short == pytest.approx(growth, rel=0.01)


def test_what_is_out_of_reach_is_counted_and_not_timed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study, "one_layer", lambda: TINY)
    monkeypatch.setattr(study, "LONGEST_TIMED", {("decode", "absorbed"): 16, ("prefill", "expanded"): 8})
    study.main(["--out", str(tmp_path), "--contexts", "8", "16", "32"])
    rows = {(r["phase"], r["context"]): r for r in read("context_cost", tmp_path)}
    assert len(rows) == 6 and all(r["flops"] > 0 for r in rows.values())
    timed = {key for key, r in rows.items() if r["seconds"] is not None}
    assert timed == {("decode", 8), ("decode", 16), ("prefill", 8)}
    assert all(rows[key]["threads"] == torch.get_num_threads() for key in timed)
    assert all(rows[key]["processor_seconds"] > 0 for key in timed)
