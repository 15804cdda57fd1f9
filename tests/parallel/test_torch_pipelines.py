"""torch.distributed.pipelining as the oracle: its schedules run our stages, and give our losses and gradients."""

import os

import pipeline_work as work
import pytest
import torch
import torch_pipelines as oracle

from dsv3lib.pipeline.runtime.processes import launch

CASES = {
    2: [("gpipe", 4), ("1f1b", 4), ("interleaved", 4), ("zbv", 4), ("dualpipev", 4)],
    4: [("1f1b", 8), ("interleaved", 8), ("zbv", 8), ("dualpipev", 8)],
}
SHARED = "model.embed_tokens.weight"  # at the first stage and, for the MTP chain, at the last
_HERE = os.path.dirname(work.__file__)


@pytest.fixture(autouse=True)
def path_for_processes(monkeypatch):
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([_HERE, *([before] if before else [])]))


def differing(theirs, ours):
    """Names of the gradients that differ by a bit, over all ranks; torch's copies of a shared weight added up.

    Where a rank holds both ends of the model, ours is one weight that gathers both gradients in turns, and torch's
    are two that are added afterwards: the same sum in another order.
    """
    wrong, seen = [], set()
    copies = [grad for their in theirs for name, grad in their["grads"] if name == SHARED]
    both_ends = any([name for name, _ in their["grads"]].count(SHARED) == 2 for their in theirs)
    for their, our in zip(theirs, ours, strict=True):
        wanted = dict(their["grads"])
        assert wanted.keys() == our["grads"].keys()
        for name, grad in our["grads"].items():
            seen.add(name)
            if name == SHARED and both_ends:
                agrees = (grad - sum(copies)).abs().max() < 1e-15 * grad.abs().max()
            else:
                agrees = torch.equal(grad, sum(copies) if name == SHARED else wanted[name])
            wrong += [] if agrees else [name]
    assert seen == {name for name, _ in work.fresh().named_parameters()}
    return wrong


@pytest.mark.parametrize("world", CASES)
def test_torchs_runtime_takes_our_stages_and_agrees_to_the_bit(world):
    by_rank = launch(world, f"{oracle.__name__}:both", [CASES[world]], timeout=200)
    for number, (name, count) in enumerate(CASES[world]):
        theirs, ours = ([found[number][who] for found in by_rank] for who in (0, 1))
        [losses] = [their["losses"] for their in theirs if their["losses"]]
        assert len(losses) == count
        assert sum(loss * (1.0 / count) for loss in losses) == ours[0]["loss"], name
        assert differing(theirs, ours) == [], name
        grads = ours[0]["grads"]
        ours[0]["grads"] = {key: grad + 1e-14 * grad.abs().max() for key, grad in grads.items()}
        assert set(differing(theirs, ours)) == grads.keys(), "a change in the last bits is seen"
