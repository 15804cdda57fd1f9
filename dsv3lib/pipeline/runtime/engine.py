"""The pipeline engine: one rank's list of actions, carried out.

    F   receive the activation, run the stage, send it on
    I   receive the gradient, run backward for inputs, send it on; the weights' products wait
    W   make the weights' products
    B   I and W together;  FB  F of one micro-batch and B of another in turns, stage by stage

Afterwards each parameter's gradient is added up over the ranks that hold a copy of it: both directions' copies, the
embedding beside the MTP chain, and the replicas (of routed experts that are spread over ranks, dp's copies alone). The
sum is made in the order of the ranks, by everybody alike, so that copies stay equal to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...linear import DeferredWeightGradients, set_recipe
from ...model import DeepSeekV3
from ...model.loss import LossWeights
from ..actions import Action, Schedule
from ..dependencies import Dependencies
from ..validation import validate
from .chunk import MicroBatch, Pass, finish, overlap
from .experts import ExpertStep, SpreadExperts, backend_of
from .layout import Layout, Part, is_expert, parts_of_ranks
from .links import Links

Span = tuple[str, float, float]
"""(action, start, end), seconds of the wall clock."""


@dataclass
class StepResult:
    """What one step of the whole pipeline gives; the same on every rank.

    Attributes:
        loss: mean over all micro-batches of all replicas. losses: its parts.
        loads: visits of each expert over the whole step, by layer. loads_of_rows: the same of each row of the step,
            [rows, E]; rows of replica 0 come first, and of its first route. loads_of_ranks: of the tokens and layers
            that each rank computed. load_of_rank: of this one.
        peak_passes: most micro-batches whose saved tensors this rank held at once.
        spans: when this rank did what; an action begins when what it needs has arrived.
        cpu: seconds of this rank's processor that each of them took, which other processes do not lengthen.
        stages: what this rank computed when, block stage by block stage ("0.3 attention↤").
        experts: traffic and load of experts that are spread over ranks; ``None`` where ep is 1.
    """

    loss: float
    losses: dict[str, float]
    loads: dict[int, Tensor]
    loads_of_rows: dict[int, Tensor]
    loads_of_ranks: list[dict[int, Tensor]]
    load_of_rank: dict[int, Tensor]
    peak_passes: int
    spans: list[Span] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    stages: list[Span] = field(default_factory=list)
    experts: ExpertStep | None = None


def groups_of(
    model: DeepSeekV3, schedule: Schedule, layout: Layout, sequence: int, costs: Sequence[float | int] | None = None
) -> list[tuple[int, ...]]:
    """All sets of ranks that exchange, for ``GlooLinks``: holders of the same parameters, and groups of experts."""
    cut = parts_of_ranks(model.config, schedule, sequence, costs)
    sets = {ranks for rank in range(layout.ep) for ranks in _holders(model, layout, cut, rank).values()}
    for rank in range(layout.world if layout.ep > 1 else 0):
        group = layout.expert_group(rank)
        sets |= {group.across(rank), group.within(rank)}
    return sorted(sets)


def _holders(
    model: DeepSeekV3, layout: Layout, cut: Sequence[dict[int, Part]], rank: int
) -> dict[str, tuple[int, ...]]:
    """Who holds a copy of each parameter; of experts, of the same ones as a rank."""
    return {
        name: tuple(
            other
            for other in range(layout.world)
            if any(part.holds(name, model.config) for part in cut[layout.stage(other)].values())
            and (not is_expert(name) or other % layout.ep == rank % layout.ep)
        )
        for name, _ in model.named_parameters()
    }


class Engine:
    """One rank of a pipelined run.

    Args:
        model: whole, with the same weights on every rank; what this rank does not hold is let go of.
        schedule: what to do.
        layout: of the ranks.
        links: to the others.
        sequence: tokens of a sequence, for the cut.
        tell: is called with each action before it begins (for whoever watches the processes).
        costs: of each piece of the model, for the cut, the same on every rank; by default its operations.
        at_once: wait for each all-to-all where it is launched: the slow twin, with the same numbers.

    Attributes:
        parameters: this rank's own, under the whole model's names; of stacked experts ``layout.experts(rank)`` alone.
        replica: whose micro-batches it works on, one of ``layout.replicas``.
        experts: this rank's share of them where ep > 1; ``backend_of(experts)`` is a ``Pass``'s backend.

    Raises:
        ConfigError: the world does not fit the layout, the layout not schedule or experts, or the ranks' models differ.
        ScheduleError: the schedule cannot run.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        schedule: Schedule,
        layout: Layout,
        links: Links,
        sequence: int = 4096,
        tell: Callable[[str], None] = lambda action: None,
        costs: Sequence[float | int] | None = None,
        at_once: bool = False,
    ) -> None:
        layout.refuse_world(links.world)
        layout.cluster(model.config)
        if schedule.stages != layout.pp:
            raise ConfigError(f"pp: {layout.pp}, expected {schedule.stages}, the ranks of {schedule.name!r}")
        validate(schedule)
        self.model, self.schedule, self.layout, self.links, self.tell = model, schedule, layout, links, tell
        self.stage, self.replica = layout.stage(links.rank), layout.replica(links.rank)
        self.graph = Dependencies.of(schedule)
        cut = parts_of_ranks(model.config, schedule, sequence, costs)
        self.parts = cut[self.stage]
        self.holders = _holders(model, layout, cut, links.rank)
        self._refuse_other_models(cut)
        self.deferred = DeferredWeightGradients(model.recipe)
        set_recipe(model, self.deferred)  # before the cut: recipes are chosen by the whole model's names
        self._let_go()
        self.experts = None
        if layout.ep > 1:
            self.experts = SpreadExperts(model, layout, links, self.deferred.recipe, at_once)
        self.parameters = dict(model.named_parameters())
        self._passes: dict[tuple[int, int], Pass] = {}
        self._local: dict[tuple, Tensor] = {}

    def _refuse_other_models(self, cut: Sequence[dict[int, Part]]) -> None:
        """Ranks with other configurations, weights or schedules would train something that nobody asked for."""
        weights = sum(p.detach().double().abs().sum().item() for p in self.model.parameters())
        mine = (self.model.config.to_dict(), self.schedule.rows(), cut, weights)
        for rank, other in enumerate(self.links.gather_objects(mine)):
            names = ("configuration", "schedule", "cut", "weights")
            for what, here, there in zip(names, mine, other, strict=True):
                if here != there:
                    raise ConfigError(
                        f"rank {rank} has another {what} than rank {self.links.rank}; start all ranks with the "
                        "same command, seed and files"
                    )

    def _let_go(self) -> None:
        """Free what this rank does not hold."""
        config, inner = self.model.config, self.model.model
        held = {
            name for name in self.holders if any(part.holds(name, config) for part in self.parts.values())
        }
        for index in range(len(inner.layers)):
            if not any(name.startswith(f"model.layers.{index}.") for name in held):
                inner.layers[index] = nn.Identity()
        if "model.embed_tokens.weight" not in held:
            inner.embed_tokens = nn.Identity()
        if "model.norm.weight" not in held:
            inner.norm = self.model.lm_head = nn.Identity()

    # ---- a step --------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Sequence[MicroBatch]], weights: LossWeights | None = None) -> StepResult:
        """Forward and backward of all micro-batches; gradients are then in ``parameters``, summed over all ranks.

        Args:
            batches: for each route of the schedule its micro-batches (of this replica).
            weights: of the loss's parts, by default the model's.

        Raises:
            ConfigError: other numbers of micro-batches than the schedule's.
        """
        counts = [len(of_route) for of_route in batches]
        wanted = [route.microbatches for route in self.schedule.routes]
        if counts != wanted:
            raise ConfigError(f"micro-batches: {counts} of the routes, expected {wanted}")
        weights = self.model.loss_weights if weights is None else weights
        self._batches, self._weights = batches, weights
        self._done: dict[tuple[int, int, int], Pass] = {}
        self._share = 1.0 / (sum(counts) * self.layout.replicas)
        for parameter in self.parameters.values():
            parameter.grad = None
        peak, spans, cpu = 0, [], []
        self._stages: list[Span] = []
        if self.experts is not None:
            self.experts.begin()
        for action in self.schedule.actions[self.stage]:
            self.tell(str(action))
            self._began, worked = time.time(), time.thread_time()
            self._carry_out(action)
            spans.append((str(action), self._began, time.time()))
            cpu.append(time.thread_time() - worked)
            peak = max(peak, self._most)
        self.tell("waiting for sends")
        self.links.flush()
        self.tell("adding gradients")
        self._combine_gradients()
        return self._result(peak, spans, cpu)

    def _carry_out(self, action: Action) -> None:
        self._most = len(self._passes)
        if action.kind == "FB":
            ahead, back = action.parts
            x, grad = self._take(ahead), self._take(back)
            new, old = self._begin(ahead), self._passes[back.direction, back.microbatch]
            overlap(new.forward(x), old.backward(grad))
            self._give(ahead, new.output)
            self._give(back, old.grad_input)
            self.deferred.take().run()
            self._end(back)
        elif action.kind == "F":
            x = self._take(action)
            new = self._begin(action)
            finish(new.forward(x))
            self._give(action, new.output)
        elif action.kind == "W":
            self._passes[action.direction, action.microbatch].later.run()
            self._end(action)
        else:
            old = self._passes[action.direction, action.microbatch]
            finish(old.backward(self._take(action)))
            self._give(action, old.grad_input)
            old.later = self.deferred.take()
            if action.kind == "B":
                old.later.run()
                self._end(action)

    def _begin(self, action: Action) -> Pass:
        route, depth = self.graph.places[self.stage, action.direction]
        batch = self._batches[route][action.microbatch]
        label, part = f"{action.direction}.{action.microbatch}", self.parts[action.direction]
        backend = backend_of(self.experts, label)
        new = Pass(self.model, part, batch, self._weights, self._share, backend, label)
        self._passes[action.direction, action.microbatch] = new
        self._most = len(self._passes)
        self._done[route, action.microbatch, depth] = new
        return new

    def _end(self, action: Action) -> None:
        self._stages += self._passes.pop((action.direction, action.microbatch)).stages

    # ---- activations and gradients on their way --------------------------------------------------------

    def _take(self, action: Action) -> Tensor | None:
        """What an action needs from the place before (forward) or after (backward)."""
        route, depth = self.graph.places[self.stage, action.direction]
        forward, ranks = action.kind == "F", self.graph.ranks[route]
        source = depth - 1 if forward else depth + 1
        if not 0 <= source < len(ranks):
            return None
        if ranks[source] == self.stage:
            return self._local.pop((forward, route, source, action.microbatch))
        ids = self._batches[route][action.microbatch].input_ids
        like = torch.empty(*ids.shape, self.model.config.hidden_size, dtype=self._dtype(), device=ids.device)
        value = self.links.receive(like, self._rank(ranks[source]), self._tag(forward, route, source))
        self._began = time.time()
        return value

    def _give(self, action: Action, value: Tensor | None) -> None:
        route, depth = self.graph.places[self.stage, action.direction]
        forward, ranks = action.kind == "F", self.graph.ranks[route]
        target = depth + 1 if forward else depth - 1
        if not 0 <= target < len(ranks):
            return
        if ranks[target] == self.stage:
            self._local[forward, route, depth, action.microbatch] = value
        else:
            self.links.send(value, self._rank(ranks[target]), self._tag(forward, route, depth))

    def _rank(self, stage: int) -> int:
        return self.layout.rank(stage, self.replica)

    def _tag(self, forward: bool, route: int, depth: int) -> int:
        return 2 * (route * len(self.graph.places) + depth) + forward + 1

    def _dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    # ---- after the last action -------------------------------------------------------------------------

    @torch.no_grad()
    def _combine_gradients(self) -> None:
        """Sum each gradient over the ranks that hold its parameter."""
        sets: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if len(self.holders[name]) > 1:
                sets.setdefault(self.holders[name], []).append(parameter)
        for ranks in sorted(sets):
            grads = [parameter.grad for parameter in sets[ranks]]
            every = self.links.gather(torch.cat([grad.flatten() for grad in grads]), ranks)
            total = every[0].clone()
            for other in every[1:]:
                total += other
            for grad, summed in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        """Clip the gradient of the whole model, as ``torch.nn.utils.clip_grad_norm_`` does in one process.

        Args:
            limit: the largest norm.

        Returns:
            The norm before.
        """
        mine = {
            (name, self.links.rank % self.layout.ep * is_expert(name)): torch.linalg.vector_norm(p.grad).item()
            for name, p in self.parameters.items()
            if self.holders[name][0] == self.links.rank  # each parameter counts once
        }
        norms: dict[tuple[str, int], float] = {}  # by name, and whose share of the experts
        for others in self.links.gather_objects(mine):
            norms |= others
        place = {name: number for number, name in enumerate(self.holders)}
        ordered = sorted(norms, key=lambda key: (place[key[0]], key[1]))
        norm = torch.linalg.vector_norm(torch.tensor([norms[key] for key in ordered], dtype=torch.float64))
        scale = torch.clamp(limit / (norm + 1e-6), max=1.0).item()
        for parameter in self.parameters.values():
            parameter.grad.mul_(scale)
        return norm.item()

    def _result(self, peak: int, spans: list[Span], cpu: list[float]) -> StepResult:
        mine = {key: (one.losses, one.balances, one.loads) for key, one in self._done.items()}
        self._done = {}
        every = self.links.gather_objects(mine)
        total, parts, rows = 0.0, {}, {}
        for replica in range(self.layout.replicas):
            ranks = [every[self.layout.rank(stage, replica)] for stage in range(self.layout.pp)]
            merged = {key: value for rank in ranks for key, value in rank.items()}
            for route, of_route in enumerate(self._batches):
                depths = len(self.graph.ranks[route])
                for micro in range(len(of_route)):
                    found = [merged[route, micro, depth] for depth in range(depths)]
                    losses, balances = dict(found[-1][0]), {}
                    for _, weighed, counted in found:
                        balances |= weighed
                        for layer, load in counted.items():
                            rows.setdefault(layer, []).append(load)
                    loss = self._assemble(losses, balances)
                    total += (loss * self._share).item()
                    for name, part in losses.items():
                        parts[name] = parts.get(name, 0.0) + (part * self._share).item()
        by_row = {layer: torch.cat(rows[layer]) for layer in sorted(rows)}
        loads = {layer: counted.sum(0) for layer, counted in by_row.items()}
        of_ranks = [_summed(rank) for rank in every]
        stages = sorted(self._stages, key=itemgetter(1))
        experts = None if self.experts is None else self.experts.step()
        own = of_ranks[self.links.rank]
        return StepResult(total, parts, loads, by_row, of_ranks, own, peak, spans, cpu, stages, experts)

    def _assemble(self, losses: dict[str, Tensor], balances: dict[int, Tensor]) -> Tensor:
        """One micro-batch's loss from its parts, in the order in which ``add_losses`` adds them."""
        loss, depths = losses["main"], [part for name, part in losses.items() if name.startswith("mtp_")]
        if depths:
            loss = loss + self._weights.mtp / len(depths) * sum(depths)
        if balances:
            losses["balance"] = sum(balances[layer] for layer in sorted(balances))
            loss = loss + losses["balance"]
        return loss


def _summed(passes: dict) -> dict[int, Tensor]:
    """The load of all that one rank computed in a step, by layer."""
    own: dict[int, Tensor] = {}
    for _, _, counted in passes.values():
        for layer, load in counted.items():
            own[layer] = own.get(layer, 0) + load.sum(0)
    return own
