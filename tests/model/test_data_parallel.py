"""DistributedDataParallel over a model: every parameter has a gradient, however short the rows are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, tokens
from torch.nn.parallel import DistributedDataParallel

from dsv3lib import ModelConfig


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, over a file: no port is opened."""
    meeting: Path = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@settings(max_examples=8)
@given(
    config=configs(mtp=(0, 3), max_layers=2),
    seed=SEEDS,
    lengths=st.lists(st.integers(1, 4), min_size=2, max_size=3),
)
def test_rows_too_short_for_the_chain_leave_no_parameter_unused(
    config: ModelConfig, seed: int, lengths: list[int]
) -> None:
    """torch raises at the forward pass after one in which a parameter had no gradient."""
    model = build(config, seed)
    parallel = DistributedDataParallel(model)
    for length in lengths:
        ids = tokens(config, 1, length, seed)
        model.zero_grad()
        parallel(ids, labels=ids).loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        plain = build(config, seed)
        loss = plain(ids, labels=ids).loss
        loss.backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_module_that_does_not_run_has_a_gradient_of_zero_even_with_an_infinite_weight() -> None:
    model = build(ModelConfig.preset("nano").replace(num_hidden_layers=1, vocab_size=20))
    module = model.model.layers[1]
    with torch.no_grad():
        module.eh_proj.weight[0, 0] = float("inf")
    loss = model(torch.tensor([[3]]), labels=torch.tensor([[3]])).loss
    loss.backward()
    assert loss.isfinite() and not module.eh_proj.weight.grad.any()
