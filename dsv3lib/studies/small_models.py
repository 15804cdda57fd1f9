"""Models and text that the studies share: MLA small enough to be trained many times, on bytes of Python's manual."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ..config import ModelConfig
from ..model import DeepSeekV3
from ..training.text.domains import builtin_domains

BYTES = 256
UNSEEN_BYTES = 65_536
PEAK_LEARNING_RATE = 5e-3
_WARM_UP_STEPS = 30


def manual() -> tuple[UInt8[Tensor, " train"], UInt8[Tensor, " unseen"]]:
    """The help topics of this Python as bytes, no paragraph twice: what is trained on, and an end that never is."""
    (docs,) = builtin_domains(("docs",))
    whole = "\n".join(docs.read(index).text for index in range(docs.count))
    text = torch.frombuffer(bytearray(whole.encode()), dtype=torch.uint8)
    return text[:-UNSEEN_BYTES], text[-UNSEEN_BYTES:]


def small_config(vocab_size: int, rotary_dims: int, **changes: object) -> ModelConfig:
    """``nano`` with two dense layers and no MTP module: MLA is what is studied, nothing else.

    Args:
        vocab_size: bytes and special tokens. rotary_dims: d_h^R. changes: other fields of the configuration.
    """
    fields = {
        "vocab_size": vocab_size,
        "qk_rope_head_dim": rotary_dims,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.05,
    }
    return ModelConfig.preset("nano").replace(**(fields | changes))


def rows_of(
    text: UInt8[Tensor, " bytes"], rows: int, length: int, generator: torch.Generator
) -> Int64[Tensor, "rows length"]:
    """``rows`` pieces of ``length`` bytes from places drawn at random."""
    starts = torch.randint(len(text) - length, (rows, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def train(
    model: DeepSeekV3,
    steps: int,
    loss_of: Callable[[DeepSeekV3, int], Tensor],
    peak: float = PEAK_LEARNING_RATE,
    constant: bool = False,
) -> Iterator[float]:
    """AdamW with a short rise and a straight fall to a tenth of the peak; yields each step's loss in nats.

    Args:
        model: trained in place. steps: how many. loss_of: the loss of one step, given the model and its number.
        peak: the learning rate at its highest. constant: rise, and then no fall (a context extension's).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = min(_WARM_UP_STEPS, max(1, steps // 5))
    model.train()
    for step in range(steps):
        fall = 1.0 if constant else 1.0 - 0.9 * step / steps
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / warm_up) * fall
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
    model.eval()
