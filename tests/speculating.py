"""Small models that speculate, and whether what they write has the model's distribution."""

from __future__ import annotations

import math

import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.inference.request import Request
from dsv3lib.inference.sampling import Sampler
from dsv3lib.inference.speculative import Verdict, speculate, verify

VOCAB = 24
NEVER = ()


def chain_model(depth=1, noise=1.0, seed=0, spread=0.3, **changes):
    """A small FP64 model with ``depth`` MTP modules; at ``noise`` 0 they know all that the model knows.

    Without the blocks' outputs the next token depends on the newest one alone, and with eh_proj = [I 0] a
    module sees just that token. Noise brings the rest in: from 0 to 1 drafts go from always to rarely right.
    """
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": spread,
        "num_nextn_predict_layers": depth, **changes,
    }  # fmt: skip
    config = ModelConfig.preset("nano").replace(**settings)
    model = DeepSeekV3(config, generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(noise)
            elif name.endswith("eh_proj.weight"):
                weight.mul_(noise)[:, : config.hidden_size] += torch.eye(config.hidden_size)
    return model


def prompts(batch, width, seed=0, vocab=VOCAB):
    return torch.randint(0, vocab, (batch, width), generator=torch.Generator().manual_seed(seed))


def tiny_vocabulary(depth):
    return chain_model(
        depth, noise=0.7, seed=3, spread=0.2, vocab_size=SMALL, hidden_size=16, num_hidden_layers=1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ).float()  # fmt: skip


SMALL, NEW, ROWS = 4, 4, 3000


def joint_distribution(model, prompt, temperature, top_p):
    """p of every continuation of NEW tokens, from the logits of all prefixes."""
    prefixes = torch.cartesian_prod(*[torch.arange(SMALL)] * NEW)  # SMALL^NEW rows
    text = torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)
    with torch.no_grad():
        logits = model(text).logits[:, prompt.shape[1] - 1 : -1]
    p = Sampler(temperature, top_p).probabilities(logits).double()
    return p.gather(-1, prefixes[..., None]).squeeze(-1).prod(-1)


def deviation(counts, p):
    """Chi-square, in standard deviations from its mean (Wilson and Hilferty); cells below 5 are joined."""
    expected = counts.sum() * p
    kept = expected >= 5
    observed = torch.cat([counts[kept], counts[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None].clamp(min=1e-9)])
    df = len(expected) - 1
    x = float(((observed - expected) ** 2 / expected).sum()) / df
    return (x ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def sampled(
    model, prompt, temperature, top_p, verifier=verify, draft_tokens=None, statistics=None, drafter=None
):
    """How often each continuation came in ROWS rows that speculate side by side."""
    request = Request.of(
        model, prompt.expand(ROWS, -1), NEW, temperature, top_p, NEVER,
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    rows = request.rows()
    for round_ in speculate(model, request, draft_tokens, statistics, verifier, drafter):
        for row, tokens in zip(rows, round_.tokens, strict=True):
            row.extend(tokens)
    new = torch.tensor(rows)[:, prompt.shape[1] :]
    index = (new * SMALL ** torch.arange(NEW - 1, -1, -1)).sum(-1)
    return torch.bincount(index, minlength=SMALL**NEW).double()


def forgets_the_residual(drafts, q, logits, sizes, sampler):
    """Wrong: after a draft that fell, the token is drawn from p and not from what is left of it."""
    accepted, _ = verify(drafts, q, logits, sizes, sampler)
    return Verdict(accepted, sampler.draw(sampler.probabilities(logits)[torch.arange(len(drafts)), accepted]))
