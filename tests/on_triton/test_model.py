"""The whole model on kernels against the same model in plain PyTorch: logits, gradients, decoding, training.

The plain side is the path that a machine without Triton takes; which kernels ran on the other is counted, so that a
layer which quietly falls back is seen.
"""

import contextlib
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from strategies import build, small, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig, YarnScaling, kernels
from dsv3lib.backends import triton_attention
from dsv3lib.kernels.toolchain import targets
from dsv3lib.layers.attention import scaled_attention
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

FORWARD = {
    "rms_norm_kernel", "norm_and_turn_kernel", "rope_kernel", "mla_prefill_kernel", "gate_kernel",
    "place_visits_kernel", "permute_kernel", "grouped_rows_kernel", "swiglu_kernel", "unpermute_kernel",
}  # fmt: skip
BACKWARD = {
    "rms_norm_backward_kernel", "norm_and_turn_backward_kernel", "gate_backward_kernel", "grouped_weight_kernel",
    "swiglu_backward_kernel", "unpermute_backward_kernel",
}  # fmt: skip
YARN = YarnScaling(4.0, 64, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Layers take PyTorch's operations, as if Triton were not installed."""
    with mock.patch.object(targets, "available", lambda tensor: False):
        yield


class Waits(TorchDispatchMode):
    """Refuses operations for whose result the host would wait on a GPU; there the driver itself refuses them."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "masked_select",
        "_unique2",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).removeprefix("aten.").startswith(self.NAMES), f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *error):
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*error)


class Counted:
    """Stands before a kernel and counts its launches."""

    def __init__(self, kernel, name: str, counts: Counter) -> None:
        self.kernel, self.name, self.counts = kernel, name, counts

    def __getitem__(self, grid):
        self.counts[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch) -> Counter:
    """Counts every kernel's launches by its name, wherever it was imported."""
    counts: Counter = Counter()
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(value, "__getitem__"):
                monkeypatch.setattr(module, name, Counted(value, name, counts))
    return counts


def made(config: ModelConfig, device: torch.device, **settings) -> DeepSeekV3:
    return build(config, **settings).to(device)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest value."""
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance * max(largest, 1e-6))


def learn(model: DeepSeekV3, ids: torch.Tensor, **call) -> tuple:
    """One forward and backward pass."""
    model.zero_grad()
    out = model(ids, labels=ids, return_mtp=True, **call)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CONFIGS = {
    "odd sizes": small(),
    "two MTP modules, YaRN": small(
        num_nextn_predict_layers=2, rope_scaling=YARN, max_position_embeddings=256
    ),
    "no query latent, one group, biases": small(
        q_lora_rank=None, n_group=1, topk_group=1, attention_bias=True, norm_topk_prob=False
    ),
    "nano": ModelConfig.preset("nano").replace(num_hidden_layers=2, vocab_size=128),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step(device, config, launches):
    """Logits of every depth, losses, loads and the gradient of every weight; packed documents."""
    model = made(config, device)
    ids = tokens(config, 2, 6).to(device)
    documents = torch.tensor([[0] * 2 + [1] * 4, [2] * 6], device=device)
    out, gradients = learn(model, ids, document_ids=documents)
    ran = set(launches)
    assert FORWARD | BACKWARD <= ran, f"did not run: {sorted((FORWARD | BACKWARD) - ran)}"
    launches.clear()
    with plain_torch():
        plain, expected = learn(model, ids, document_ids=documents)
    assert not launches, "the plain side is to run no kernel"
    close(out.logits, plain.logits)
    for a, b in zip(out.mtp_logits, plain.mtp_logits, strict=True):
        close(a, b)
    assert torch.equal(out.expert_load, plain.expert_load)
    for name, loss in plain.losses.items():
        torch.testing.assert_close(out.losses[name], loss, rtol=1e-5, atol=1e-7)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        close(gradients[name], gradient, 1e-4)


def test_a_difference_is_seen(device):
    """What the comparison above would say of a model whose router's scale is off by a thousandth."""
    config = small()
    model = made(config, device)
    ids = tokens(config, 1, 6).to(device)
    other = made(config.replace(routed_scaling_factor=config.routed_scaling_factor * 1.001), device)
    with torch.no_grad():
        got = model(ids).logits
        with plain_torch():
            close(got, model(ids).logits)
            with pytest.raises(AssertionError):
                close(got, other(ids).logits)


def test_recomputation_gives_the_same_gradients(device):
    """Norms and up-projections made again in backward; there the residual is added by PyTorch."""
    config = small()
    ids = tokens(config, 1, 5).to(device)
    (_, kept), (_, remade) = (learn(made(config, device, recompute=r), ids) for r in (False, True))
    for name, gradient in kept.items():
        close(remade[name], gradient, 1e-6)


@torch.no_grad()
def decode(model: DeepSeekV3, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The prompt at once, then token by token, two at a time at the end, and once more after a crop by row."""
    cache = LatentCache(model.config)
    parts = [model(ids[:, :prompt], cache=cache).logits]
    for i in range(prompt, ids.shape[1] - 2):
        parts.append(model(ids[:, i : i + 1], cache=cache).logits)
    parts.append(model(ids[:, -2:], cache=cache).logits)
    cache.crop(torch.tensor([ids.shape[1] - 1, ids.shape[1] - 4]))
    parts.append(model(ids[:, 1:3], cache=cache).logits)  # rows of different lengths
    parts.append(model(ids[:, 3:9], cache=cache).logits)  # more new tokens than the kernel takes at once
    return torch.cat(parts, 1)


def test_decoding(device, launches):
    config = CONFIGS["nano"]
    model = made(config, device)
    ids = tokens(config, 2, 11).to(device)
    got = decode(model, ids, 7)
    assert launches["mla_decode_kernel"] > 0 and launches["mla_prefill_kernel"] > 0
    with plain_torch():
        expected = decode(model, ids, 7)
    close(got, expected)
    with torch.no_grad():
        close(got[:, :11], model(ids).logits)


@pytest.mark.parametrize("held", [None, [9, 6], [5, 9]])
def test_expanded_rows_end_where_their_length_says(device, held):
    """The last five positions of each row over all of them; what lies beyond a row's end is large."""
    q, k, v = (torch.randn(2, 9, 3, n, device=device) for n in (10, 6, 5))
    q, k_rope = q[:, :5].transpose(1, 2), torch.randn(2, 9, 4, device=device)
    ends = torch.tensor(held or [9, 9], device=device)
    for row, end in enumerate(ends.tolist()):
        k[row, end:], v[row, end:], k_rope[row, end:] = 1e3, 1e3, 1e3
    flat = (x.flatten(0, 1) for x in (k, v, k_rope))
    got = triton_attention.expanded(q, *flat, None if held is None else ends.int(), 0.3)
    for row, end in enumerate(ends.tolist()):
        keys = torch.cat([k[row], k_rope[row, :, None].expand(-1, 3, -1)], -1)[:end].transpose(0, 1)
        expected = scaled_attention(q[row, None], keys[None], v[row, None, :end].transpose(1, 2), None, 0.3)
        close(got[row], expected[0].transpose(0, 1))


def test_a_cache_longer_than_a_page(device):
    """Pages fill up, the buffer grows; what is reserved beyond the tokens is NaN and is never read."""
    config = small(max_position_embeddings=160, num_hidden_layers=1, num_nextn_predict_layers=0)
    model = made(config, device)
    ids = tokens(config, 1, 67).to(device)
    cache = LatentCache(config, capacity=1)
    with torch.no_grad():
        first = model(ids[:, :62], cache=cache).logits
        for layer in range(config.num_hidden_layers):
            buffer = cache._buffers[layer]
            assert buffer.shape[1] == 64, "a whole number of pages"
            buffer[:, 62:] = float("nan")
        rest = [model(ids[:, i : i + 1], cache=cache).logits for i in range(62, 67)]
        close(torch.cat([first, *rest], 1), model(ids).logits)


def test_generation(device, launches):
    """Greedy text, prompts of unequal length, speculation: the tokens of the plain path."""
    config = small()
    model = made(config, device)
    ids, lengths = tokens(config, 2, 6).to(device), torch.tensor([6, 4])
    got = model.generate(ids, max_new_tokens=4, lengths=lengths)
    fast = model.generate(ids, max_new_tokens=4, lengths=lengths, speculative=True, draft_tokens=2)
    alone = model.generate(ids[:1], max_new_tokens=2)
    assert launches["mla_decode_kernel"] > 0
    with plain_torch():
        assert torch.equal(got, model.generate(ids, max_new_tokens=4, lengths=lengths))
        assert torch.equal(alone, model.generate(ids[:1], max_new_tokens=2))
    assert torch.equal(got, fast)


def test_the_host_never_waits(device, monkeypatch):
    """A training pass and a decoded token, queued whole: no value comes back before the caller asks for one.

    The first calls are let off: they make tables, and compile. What is checked of values on a CPU alone is left out.
    """
    config = small(num_nextn_predict_layers=0)
    model = made(config, device)
    ids = tokens(config, 1, 4).to(device)
    monkeypatch.setattr("dsv3lib.model.deepseek_v3.check_inputs", lambda *inputs: None)
    cache = LatentCache(config)
    with torch.no_grad():
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache)
    learn(model, ids)
    with Waits():
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model(ids[:, :1], cache=cache)
        with pytest.raises((AssertionError, RuntimeError), match="waits|synchroniz"):
            model(ids).logits.sum().item()


def test_in_half_precision(device, matrix_dtype):
    """In 16 bits kernels and plain path each round in their own places; both stay as near to FP32."""
    config = CONFIGS["nano"]
    model = made(config, device)
    ids = tokens(config, 1, 8).to(device)
    with torch.no_grad(), plain_torch():
        exact = model(ids).logits
        plain = model.to(matrix_dtype)(ids).logits.float()
    with torch.no_grad():
        got = model(ids).logits
    assert got.dtype == matrix_dtype
    allowed = 2.0 * float((plain - exact).norm()) + 1e-3 * float(exact.norm())
    assert float((got.float() - exact).norm()) <= allowed


def test_the_trainer(device, launches):
    """Two steps of the real loop: optimiser, bias update and averaged weights behind it."""
    config = ModelConfig.preset("nano").replace(num_hidden_layers=2)
    text = builtin_domains(("arithmetic",)), default_tokenizer()

    def losses() -> list[float]:
        model = made(config, device)
        settings = TrainingConfig(steps=2, batch_size=1, validation_batches=0, threads=1)
        trainer = Trainer(model, PackedStream(*text, 8), settings)
        return [trainer.step()["loss"] for _ in range(2)]

    got = losses()
    assert BACKWARD <= set(launches)
    with plain_torch():
        expected = losses()
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=0)
