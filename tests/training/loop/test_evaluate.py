"""Validation: by domain, per token and per byte."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainers import SIZE

from dsv3lib.training.loop.evaluate import evaluate, token_bytes
from dsv3lib.training.text.tokenizer import default_tokenizer


def test_a_model_that_knows_nothing_pays_ln_v_for_every_token(make, text):
    trainer = make(batch_size_start=4)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    trainer.model.train()
    result = evaluate(trainer.model, trainer.stream, batches=1, batch_size=4)
    assert trainer.model.training and list(result.domains) == ["docs", "arithmetic"]
    for name, domain in result.domains.items():
        assert domain.loss == pytest.approx(math.log(SIZE.vocab_size), rel=1e-6)
        batch = trainer.stream.validation_batches(name, 1, 4)[0]
        same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
        targets = batch.input_ids[:, 1:][same & (batch.labels[:, 1:] >= 0)].tolist()
        size = sum(len(text[1].backend.id_to_token(t)) for t in targets if t > 5)
        assert domain.tokens == len(targets)
        assert domain.bits_per_byte == pytest.approx(12 * len(targets) / size, rel=1e-6)  # log2(4096) = 12
    assert len(result.max_violation) == len(SIZE.moe_layers)


@given(st.text(max_size=60).filter(lambda s: s.isprintable()))
def test_token_bytes_add_up_to_the_texts_bytes(written):
    tokenizer = default_tokenizer()
    ids = tokenizer.encode(written, bos=True, eos=True)
    assert token_bytes(tokenizer)[torch.tensor(ids)].sum() == len(written.encode())
