"""Whole layers at V3's width, and a small model end to end: with our kernels, and with PyTorch's operations alone.

The second is the same model on the path that a machine without Triton takes, so the ratio is what the kernels
bring where it counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.backends import choose
from dsv3lib.kernels.toolchain import targets
from dsv3lib.layers.attention import MultiHeadLatentAttention, Step
from dsv3lib.layers.experts import MixtureOfExperts
from dsv3lib.layers.rope import RotaryEmbedding


@dataclass
class Run:
    """One thing to time in both ways.

    Args:
        name: what it is. tokens: it handles a call. call: does it once, returns a tensor to compare.
    """

    name: str
    tokens: int
    call: Callable[[], Tensor]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Layers take PyTorch's operations, as if Triton were not installed."""
    with mock.patch.object(targets, "available", lambda tensor: False):
        yield


def layers(device: torch.device, config: ModelConfig, tokens: int) -> Iterator[Run]:
    """MLA and the mixture of experts, forward and backward, on ``tokens`` tokens in one sequence."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn_like(x)
    with device:
        attention = fresh(MultiHeadLatentAttention(config, 0), dtype)
    rotations = RotaryEmbedding(config).table(tokens, x)

    def attend() -> Tensor:
        return attention(x, Step(rotations, backend=choose(x)))  # noqa: F821  deleted below

    yield Run("MLA forward", tokens, no_grad(attend))
    yield Run("MLA forward and backward", tokens, gradient(attend, attention, x, grad))
    del attention
    with torch.device("meta"):
        mixture = MixtureOfExperts(config)
    mixture = fresh(mixture.to_empty(device=device), dtype)

    def mix() -> Tensor:
        """The mixture as a block runs it: gate, dispatch, experts, combine, and the shared expert."""
        compute, rows = choose(x), x.flatten(0, 1)
        indices, weights, _ = compute.route(mixture.gate, rows)
        sent = compute.dispatch(mixture.experts, rows, indices, weights)
        routed = compute.combine(compute.experts(mixture.experts, sent), sent)
        return routed.view_as(x) + compute.feed_forward(mixture.shared_experts, x)

    yield Run("MoE forward", tokens, no_grad(mix))
    yield Run("MoE forward and backward", tokens, gradient(mix, mixture, x, grad))


def end_to_end(
    device: torch.device, config: ModelConfig, batch: int, tokens: int, context: int
) -> Iterator[Run]:
    """A small model: a training step's forward and backward; a prefill; one decoded token at a context."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = fresh(DeepSeekV3(config), dtype)
    ids = torch.randint(config.vocab_size, (batch, tokens), device=device)

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    yield Run("train: forward and backward", batch * tokens, train)
    model.zero_grad(set_to_none=True)
    prompt = torch.randint(config.vocab_size, (1, context), device=device)
    yield Run(f"prefill {context}", context, no_grad(lambda: model(prompt, cache=LatentCache(config)).logits))
    caches: dict[bool, LatentCache] = {}

    def decode() -> Tensor:
        way = targets.available(prompt)
        if way not in caches:
            caches[way] = LatentCache(config)
            model(prompt, cache=caches[way])
        caches[way].crop(context)
        return model(prompt[:, -1:], cache=caches[way]).logits

    yield Run(f"decode at {context}", 1, no_grad(decode))


def fresh(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights drawn as V3's are; the router's bias stays FP32 and zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtype)
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            elif "norm" in name:
                parameter.fill_(1.0)
        for buffer in module.buffers():
            buffer.zero_()
    return module


def no_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call without gradients."""

    def run() -> Tensor:
        with torch.inference_mode():
            return call()

    return run


def gradient(
    call: Callable[[], Tensor], module: torch.nn.Module, x: Tensor, grad: Tensor
) -> Callable[[], Tensor]:
    """The call and its backward; gives the gradient of x."""
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> Tensor:
        return torch.autograd.grad(call(), leaves, grad, allow_unused=True)[0]

    return run
