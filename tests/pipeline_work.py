"""What the ranks of the pipeline's tests do; imported by their processes, which do not run under pytest."""

import os

import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.fp8 import Recipe
from dsv3lib.layers.operations import PLAIN_OPERATIONS
from dsv3lib.pipeline import schedule
from dsv3lib.pipeline.runtime.chunk import MicroBatch
from dsv3lib.pipeline.runtime.engine import Engine, groups_of
from dsv3lib.pipeline.runtime.layout import Layout
from dsv3lib.pipeline.runtime.links import in_threads
from dsv3lib.training.loop.balance import update_bias

LENGTH, STEPS, CLIP, RATE, SPEED = 8, 2, 0.5, 1e-3, 0.01
NO_CLIP = 1e9
"""A norm that no gradient has; the norm is told all the same."""


def config():
    """Eight stages' worth of layers, as small as they come."""
    return ModelConfig.preset("nano").replace(num_hidden_layers=7, vocab_size=64)


def fresh(recompute=False, recipe="none"):
    """The same weights in every process."""
    generator = torch.Generator().manual_seed(0)
    model = DeepSeekV3(config(), generator=generator, recompute=recompute, recipe=Recipe.named(recipe))
    return model.double() if recipe == "none" else model


def data(step, count):
    """The step's micro-batches, of all replicas."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = [torch.randint(0, 64, (1, LENGTH), generator=generator) for _ in range(count)]
    return [MicroBatch(x, x) for x in ids]


def by_route(batches, routes):
    """One replica's micro-batches, shared out among the directions."""
    split, begin = [], 0
    for route in routes:
        split.append(batches[begin : begin + route.microbatches])
        begin += route.microbatches
    return split


def train(links_of, case, tell=lambda doing: None):
    """Several optimiser steps of one case: (schedule, pp, dp, micro-batches, recompute, recipe, clipping)."""
    name, pp, dp, count, recompute, recipe, clipping = case
    plan, layout, model = schedule(name, pp, count), Layout(pp, dp), fresh(recompute, recipe)
    links = links_of(groups_of(model, plan, layout, LENGTH))
    engine = Engine(model, plan, layout, links, LENGTH, tell)
    routers = {
        i: layer.mlp.gate
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer, "mlp") and hasattr(layer.mlp, "gate")
    }
    optimizer = torch.optim.AdamW(engine.parameters.values(), lr=RATE, foreach=False)
    steps = []
    for step in range(STEPS):
        mine = data(step, count * dp)[engine.replica * count :][:count]
        result = engine.step(by_route(mine, plan.routes))
        norm = engine.clip(CLIP if clipping else NO_CLIP)
        optimizer.step()
        for layer, router in routers.items():
            update_bias(router, result.loads[layer], SPEED)
        steps.append((result.loss, norm, {i: x.tolist() for i, x in result.loads.items()}))
    weights = {name: p.detach() for name, p in engine.parameters.items()}
    biases = {i: router.e_score_correction_bias.clone() for i, router in routers.items()}
    return {
        "steps": steps, "weights": weights, "biases": biases, "peak": result.peak_passes, "pid": os.getpid(),
        "bytes": links.sent_bytes, "spans": result.spans,
    }  # fmt: skip


def all_cases(rank, cases):
    """Every case of one world size in the same processes."""
    return [train(rank.links, case, rank.tell) for case in cases]


def references(_, world, cases):
    """The ranks of every case as threads of one process, and in FP64 the whole model."""
    return [
        (
            in_threads(world, lambda links, case=case: train(lambda _: links, case)),
            plain(case) if case[5] == "none" else None,
        )
        for case in cases
    ]


def plain(case):
    """The whole model in one piece on the same micro-batches."""
    _, _, dp, count, recompute, recipe, clipping = case
    model = fresh(recompute, recipe)
    # The stages run plain PyTorch. The fast CPU forms add up in another order: now and then the last bit differs.
    model.choice.backend = lambda *_, **__: PLAIN_OPERATIONS
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, foreach=False)
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, load = 0.0, 0
        for batch in data(step, count * dp):
            out = model(batch.input_ids, labels=batch.labels)
            loss = out.loss * (1.0 / (count * dp))
            loss.backward()
            total, load = total + loss.item(), load + out.expert_load
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP if clipping else NO_CLIP).item()
        optimizer.step()
        for router, of_router in zip(model.routers(), load, strict=True):
            update_bias(router, of_router, SPEED)
        steps.append((total, norm, dict(zip(config().moe_layers, load.tolist(), strict=True))))
    return {"steps": steps, "weights": {name: p.detach() for name, p in model.named_parameters()}}
