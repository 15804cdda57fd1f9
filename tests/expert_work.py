"""What the ranks of the tests of expert parallelism do; imported by their processes, which do not run under pytest."""

import os
import time
from contextlib import contextmanager

import pipeline_work as pipeline
import torch

from dsv3lib import DeepSeekV3
from dsv3lib.fp8 import Recipe
from dsv3lib.layers.operations import PLAIN_OPERATIONS
from dsv3lib.parallel import wires
from dsv3lib.pipeline import schedule
from dsv3lib.pipeline.runtime.chunk import Pass
from dsv3lib.pipeline.runtime.engine import Engine, groups_of
from dsv3lib.pipeline.runtime.layout import Layout
from dsv3lib.training.loop.balance import update_bias

STEPS, CLIP, RATE, SPEED = 2, 0.5, 1e-3, 0.01


def config(layers):
    """Blocks as small as they come, all but the first with experts in four groups."""
    return pipeline.config().replace(num_hidden_layers=layers)


def fresh(case):
    """The same weights in every process."""
    _, layout, _, recompute, recipe = case
    layers = max(2, 2 * Layout.parse(layout).pp - 1)
    generator = torch.Generator().manual_seed(0)
    model = DeepSeekV3(config(layers), generator=generator, recompute=recompute, recipe=Recipe.named(recipe))
    with torch.no_grad():  # biases that leave experts without a token on some ranks
        for number, router in enumerate(model.routers()):
            router.e_score_correction_bias.copy_(torch.linspace(0.5, -0.5, 8).roll(number))
    return model.double() if recipe == "none" else model


def train(links_of, case, tell=lambda doing: None, at_once=False):
    """Several optimiser steps of one case: (schedule, layout, micro-batches, recompute, recipe)."""
    name, text, count, _, _ = case
    layout, model = Layout.parse(text), fresh(case)
    plan = schedule(name, layout.pp, count)
    links = links_of(groups_of(model, plan, layout, pipeline.LENGTH))
    engine = Engine(model, plan, layout, links, pipeline.LENGTH, tell, at_once=at_once)
    routers = {
        i: layer.mlp.gate
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer, "mlp") and hasattr(layer.mlp, "gate")
    }
    optimizer = torch.optim.AdamW(engine.parameters.values(), lr=RATE, foreach=False)
    steps, chosen, exchange = [], [], engine.experts.exchange
    own = exchange.route
    exchange.route = lambda indices: (chosen.append(indices.tolist()), own(indices))[1]  # what the routers chose
    for step in range(STEPS):
        chosen.clear()
        mine = pipeline.data(step, count * layout.replicas)[engine.replica * count :][:count]
        result = engine.step(pipeline.by_route(mine, plan.routes))
        norm = engine.clip(CLIP)
        optimizer.step()
        for layer, router in routers.items():
            update_bias(router, result.loads[layer], SPEED)
        steps.append((result.loss, norm, {i: x.tolist() for i, x in result.loads.items()}))
    return {
        "steps": steps, "weights": {name: p.detach() for name, p in engine.parameters.items()},
        "biases": {i: router.e_score_correction_bias.clone() for i, router in routers.items()},
        "peak": result.peak_passes, "pid": os.getpid(), "bytes": links.sent_bytes, "chosen": chosen,
        "load": result.load_of_rank, "experts": result.experts, "stages": result.stages, "spans": result.spans,
    }  # fmt: skip


@contextmanager
def as_slow_as_in_a_large_model(seconds):
    """Attention that computes, and exchanges that travel, for longer than a busy machine lets a thread wait.

    Here an attention computes for a millisecond, and four ranks share two cores: whether an exchange that is launched
    before it still travels when it begins would be luck. The numbers are the same.
    """
    timed, carry_out = Pass._timed, wires._carry_out

    def slow_attention(self, stage, *grad):
        def longer(*grad):
            name = stage(*grad)
            time.sleep(seconds if name == "attention" else 0)
            return name

        return timed(self, longer, *grad)

    def slow_exchange(exchange):
        def longer():
            result = exchange()
            time.sleep(seconds)
            return result

        return carry_out(longer)

    Pass._timed, wires._carry_out = slow_attention, slow_exchange
    try:
        yield
    finally:
        Pass._timed, wires._carry_out = timed, carry_out


def all_cases(rank, cases, at_once=False):
    """Every case of one world size in the same processes."""
    found = []
    for case in cases:
        place = list(Layout.parse(case[1]).mesh().get_coordinate())
        with as_slow_as_in_a_large_model(0.05 if case[0] == "dualpipe" else 0):
            found.append(train(rank.links, case, rank.tell, at_once) | {"place": place})
    return found


def plain(case):
    """The whole model in one piece on the same micro-batches."""
    _, text, count, _, _ = case
    total_batches = count * Layout.parse(text).replicas
    model = fresh(case)
    model.choice.backend = lambda *_, **__: PLAIN_OPERATIONS
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, foreach=False)
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, load = 0.0, 0
        for batch in pipeline.data(step, total_batches):
            out = model(batch.input_ids, labels=batch.labels)
            loss = out.loss * (1.0 / total_batches)
            loss.backward()
            total, load = total + loss.item(), load + out.expert_load
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        optimizer.step()
        for router, of_router in zip(model.routers(), load, strict=True):
            update_bias(router, of_router, SPEED)
        steps.append((total, norm, dict(zip(model.config.moe_layers, load.tolist(), strict=True))))
    return {"steps": steps, "weights": {name: p.detach() for name, p in model.named_parameters()}}
