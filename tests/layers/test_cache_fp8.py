"""The latent cache in FP8: its bytes, what it does to the logits, and that it behaves as the other one does."""

import pytest
import torch
from strategies import build, tokens

from dsv3lib import LatentCache, ModelConfig
from dsv3lib.errors import CacheError
from dsv3lib.layers.operations import Operations

CONFIG = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=0, num_hidden_layers=2, vocab_size=64)


def test_656_bytes_a_token_and_layer_at_v3_s_sizes() -> None:
    v3 = ModelConfig.preset("v3-671b")
    cache = LatentCache(v3, format="fp8")
    from dsv3lib.kernels.attention.latent_format import dequantize_latent, quantize_latent
    from dsv3lib.layers.cache import LatentCodec

    cache.plan(1, 3, codec=LatentCodec(quantize_latent, dequantize_latent))
    for layer in range(v3.num_hidden_layers):
        cache.append(layer, torch.randn(1, 3, v3.latent_dim).bfloat16())
    cache.advance(3)
    assert cache.nbytes == 3 * 61 * 656


def test_logits_and_next_tokens_stay_near() -> None:
    model, ids = build(CONFIG).eval(), tokens(CONFIG, 4, 40)
    logits = {}
    with torch.no_grad():
        for format in ("model", "fp8"):
            cache = LatentCache(CONFIG, format=format)
            parts = [model(ids[:, :30], cache=cache).logits]
            parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(30, 40)]
            logits[format] = torch.cat(parts, 1)
    error = (logits["fp8"] - logits["model"]).norm() / logits["model"].norm()
    alike = (logits["fp8"].argmax(-1) == logits["model"].argmax(-1)).double().mean()
    assert 1e-4 < error < 0.2 and alike > 0.8


def test_rows_of_unequal_length_and_cropping() -> None:
    model, ids = build(CONFIG).eval(), tokens(CONFIG, 2, 12)
    with torch.no_grad():
        cache = LatentCache(CONFIG, format="fp8")
        model(ids[:, :8], cache=cache, lengths=torch.tensor([8, 5]))
        ragged = model(ids[:, 8:9], cache=cache).logits
        alone = LatentCache(CONFIG, format="fp8")
        model(ids[1:, :5], cache=alone)
        torch.testing.assert_close(ragged[1:], model(ids[1:, 8:9], cache=alone).logits, atol=1e-4, rtol=1e-4)
        cache.crop(torch.tensor([4, 5]))
        assert cache.lengths.tolist() == [4, 5] and model(ids[:, 9:10], cache=cache).logits.isfinite().all()


def test_what_is_refused(monkeypatch) -> None:
    with pytest.raises(CacheError, match="format is 'fp4', expected one of 'model', 'fp8'"):
        LatentCache(CONFIG, format="fp4")
    cache = LatentCache(CONFIG, format="fp8")
    with pytest.raises(CacheError, match="no FP8 latents"):
        cache.plan(1, 1, codec=Operations.latent_codec)
