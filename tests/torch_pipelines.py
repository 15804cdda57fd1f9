"""Our stages under torch.distributed.pipelining's own runtime; imported by its processes, which run no pytest.

A stage's blocks become one ``nn.Module``, which torch differentiates as a whole: no stage of ours is cut, no weight
gradient waits in our queue. Tokens travel in one channel more beside the activation, for the MTP chain and the loss.
"""

import pipeline_work as work
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from dsv3lib.layers.step import Step
from dsv3lib.model.loss import LossWeights, add_losses
from dsv3lib.model.outputs import ModelOutput
from dsv3lib.model.stages import embed, head
from dsv3lib.pipeline import schedule
from dsv3lib.pipeline.dependencies import Dependencies
from dsv3lib.pipeline.runtime.engine import Engine, groups_of
from dsv3lib.pipeline.runtime.layout import Layout, parts_of_ranks

TORCHS = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV,
}  # fmt: skip
WEIGHTS = LossWeights(mtp=0.3, balance=0.0)
"""The auxiliary loss belongs to no last stage, and torch's runtime has one loss."""


class StageModule(nn.Module):
    """One chunk of our model as a module.

    Args:
        model: whole. part: what this stage holds of it.
    """

    def __init__(self, model, part):
        super().__init__()
        self.part, self._whole = part, [model]  # in a list: the whole model is no child of a stage
        held = {name: p for name, p in model.named_parameters() if part.holds(name, model.config)}
        self.names = list(held)
        self.held = nn.ParameterList(held.values())

    def forward(self, x):
        model = self._whole[0]
        hidden, ids = (embed(model, x), x) if self.part.first else (x[..., :-1], x[..., -1].round().long())
        step = Step(model.rope.table(ids.shape[1], hidden))
        for layer in self.part.blocks:
            hidden, _ = model.model.layers[layer](hidden, step)
        if not self.part.last:
            return torch.cat([hidden, ids.unsqueeze(-1).to(hidden)], dim=-1)
        final, logits = head(model, hidden, step)
        out = ModelOutput(logits, final, n_routed_experts=model.config.n_routed_experts)
        out.mtp_logits, _ = model.mtp_chain(final, embed(model, ids), step)
        add_losses(out, ids, None, [], model.config.num_experts_per_tok, WEIGHTS)
        return out.loss.reshape(1)


def by_torch(name, stages, count):
    """One step by torch's runtime: this rank's losses and gradients."""
    rank, plan, config = dist.get_rank(), schedule(name, stages, count), work.config()
    places = Dependencies.of(plan).places
    of_rank = parts_of_ranks(config, plan, work.LENGTH)[rank]
    total, width = len(plan.routes[0].places), config.hidden_size + 1
    like = torch.empty(1, work.LENGTH, width, dtype=torch.float64, requires_grad=True)
    modules, chunks = {}, []
    for chunk, part in sorted(of_rank.items()):
        modules[chunk] = StageModule(work.fresh(), part)  # torch scales the gradients of each stage by itself
        enters = torch.empty(1, work.LENGTH, dtype=torch.long) if part.first else like
        leaves = torch.empty(1, dtype=torch.float64, requires_grad=True) if part.last else like
        chunks.append(
            PipelineStage(modules[chunk], places[rank, chunk][1], total, torch.device("cpu"), enters, leaves)
        )
    kind = TORCHS[name]
    runtime = kind(chunks if len(chunks) > 1 else chunks[0], count, loss_fn=lambda out, target: out.sum())
    ids = torch.cat([batch.input_ids for batch in work.data(0, count)])
    losses = []
    first, last = (any(getattr(part, end) for part in of_rank.values()) for end in ("first", "last"))
    runtime.step(*([ids] if first else []), **({"target": ids, "losses": losses} if last else {}))
    grads = [
        (name_, parameter.grad)
        for module in modules.values()
        for name_, parameter in zip(module.names, module.held, strict=True)
    ]
    return {"losses": [loss.item() for loss in losses], "grads": grads}


def by_us(rank, name, stages, count):
    """The same step by ours."""
    plan, model = schedule(name, stages, count), work.fresh()
    links = rank.links(groups_of(model, plan, Layout(stages), work.LENGTH))
    engine = Engine(model, plan, Layout(stages), links, work.LENGTH, rank.tell)
    result = engine.step(work.by_route(work.data(0, count), plan.routes), WEIGHTS)
    return {"loss": result.loss, "grads": {name_: p.grad for name_, p in engine.parameters.items()}}


def both(rank, cases):
    """Every case of one world size, by torch and by us, in the same processes."""
    found = []
    for name, count in cases:
        rank.tell(f"torch's {name}")
        theirs = by_torch(name, rank.world, count)
        found.append((theirs, by_us(rank, name, rank.world, count)))
    return found
