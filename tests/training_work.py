"""What the ranks of the tests of parallel training do; imported by their processes, which do not run under pytest."""

import os
import shutil
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import TrainingError
from dsv3lib.layers.operations import PLAIN_OPERATIONS
from dsv3lib.model.loss import LossWeights
from dsv3lib.pipeline.runtime import links
from dsv3lib.pipeline.runtime.layout import Layout
from dsv3lib.pipeline.runtime.worker import Rank
from dsv3lib.training.loop.balance import update_bias
from dsv3lib.training.loop.optimizer import AdamW
from dsv3lib.training.loop.schedule import Schedule
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.run import save_point
from dsv3lib.training.run.parallel import Parallel, ParallelTrainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import ArithmeticDomain, held_in_memory
from dsv3lib.training.text.tokenizer import default_tokenizer

STEPS, LENGTH, MICROBATCHES = 4, 16, 8
MODEL = ModelConfig.preset("nano").replace(num_hidden_layers=4)
WORDS = held_in_memory("words", {f"{n}.txt": f"{n} times {n} is {n * n}, says page {n}. " * 4 for n in range(40)})


def settings(steps=STEPS, **changed):
    """A run in which everything moves: rates, λ, biases; clipped at a norm that it passes."""
    fields = {
        "steps": steps, "batch_size": MICROBATCHES, "batch_size_start": MICROBATCHES, "warmup_steps": 1,
        "gradient_clip": 0.5, "checkpoint_every": 2, "validation_batches": 1, "threads": 1, "aux_loss_alpha": 1e-3,
    }  # fmt: skip
    return TrainingConfig(**fields | changed)


def stream(seed=0):
    """Two domains' text."""
    return PackedStream([ArithmeticDomain(), WORDS], default_tokenizer(), LENGTH, seed=seed)


def model(seed=0):
    """The same weights in every process, in FP64."""
    return DeepSeekV3(MODEL, generator=torch.Generator().manual_seed(seed)).double()


def trainer(rank, layout, schedule, recompute=False, out=None, trace=False, **changed):
    """A rank's trainer; it goes on where the folder holds a run."""
    resume = out is not None and (Path(out) / "run.json").exists()
    return ParallelTrainer(
        model(), stream(), settings(**changed), Parallel(Layout.parse(layout), schedule, MICROBATCHES, recompute), rank,
        out=out, resume=resume, trace=trace,
    )  # fmt: skip


def train(rank, cases):
    """Every case of one world size in the same processes; a case is the arguments of ``trainer``."""
    return [_train(rank, **case) for case in cases]


def _train(rank, interrupted=None, unsent=False, **case):
    if unsent:
        return _unsent(rank, **case)
    if interrupted is not None and rank.rank == 0:
        _copy(Path(interrupted), Path(case["out"]))
    rank.gather_objects(None)
    made = trainer(rank, **case)
    records = list(made)
    return {
        "records": records, "weights": {name: p.detach() for name, p in made.model.named_parameters()},
        "validation": made.validation.to_dict(), "pid": os.getpid(), "spans": bool(made._spans),
        "states": {name: state.nbytes for name, state in made._state_tensors().items()}, "bytes": made.state_bytes(),
    }  # fmt: skip


def _unsent(rank, **case):
    """The wrong twin: what a rank updates stays with it. Returns the error."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with patch.object(ZeroRedundancyOptimizer, "_sync_params", lambda self: None):
        try:
            list(trainer(rank, **case))
        except TrainingError as error:
            return str(error)


def in_threads(case):
    """The ranks of one case as threads of this process: no process groups, so that each keeps all of its states."""
    def one(to_others):
        rank = Rank(to_others.rank, to_others.world)
        rank.links, rank.gather_objects = lambda groups: to_others, to_others.gather_objects
        return _train(rank, **case)

    return links.in_threads(Layout.parse(case["layout"]).world, one)


def _copy(run, to):
    """A run as it was after its second step."""
    shutil.copytree(run, to)
    shutil.rmtree(save_point.savepoint_folder(to, STEPS))
    shutil.rmtree(to / "model")


def alone(case):
    """One case by this process, without any other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _train(Rank(0, 1), **case)
    finally:
        dist.destroy_process_group()


def plain():
    """The whole model in one piece on the same micro-batches, in a loop of its own."""
    whole, text, config = model(), stream(), settings()
    # The stages run plain PyTorch. The fast CPU forms add up in another order: now and then the last bit differs.
    whole.choice.backend = lambda *_, **__: PLAIN_OPERATIONS
    adam = AdamW(whole.named_parameters(), config.beta1, config.beta2, config.epsilon, config.weight_decay)
    curves, records = Schedule(config, STEPS), []
    for step in range(1, STEPS + 1):
        batch, total, load = text.next_batch(curves.batch_size(step)), 0.0, 0
        weights = LossWeights(curves.mtp_loss_weight(step), config.aux_loss_alpha)
        adam.zero_grad()
        for row in range(MICROBATCHES):
            ids, labels, documents = (
                t[row : row + 1] for t in (batch.input_ids, batch.labels, batch.document_ids)
            )
            out = whole(ids, labels=labels, document_ids=documents, loss_weights=weights)
            loss = out.loss * (1.0 / MICROBATCHES)
            loss.backward()
            total, load = total + loss.item(), load + out.expert_load
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), config.gradient_clip).item()
        adam.step(curves.learning_rate(step))
        for router, of_router in zip(whole.routers(), load, strict=True):
            update_bias(router, of_router, curves.bias_speed(step))
        records.append({"loss": total, "gradient_norm": norm, "expert_load": load.tolist()})
    return records, {name: p.detach() for name, p in whole.named_parameters()}


def differing(rank, what):
    """One rank's settings, text or weights are others than the rest's."""
    other = rank.rank == 1
    config = settings(learning_rate=1e-3 if other and what == "settings" else 2e-3)
    text, weights = stream(seed=int(other and what == "text")), model(seed=int(other and what == "weights"))
    if other and what == "a file":  # of the same length: only its tokens tell
        text.domains[1] = held_in_memory("words", {f"{n}.txt": "x" * len(WORDS.read(n).text) for n in range(40)})
    parallel = Parallel(Layout(2), "1f1b", MICROBATCHES)
    ParallelTrainer(weights, text, config, parallel, rank).step()


def fault(rank, kind, who, moment, out, begun):
    """A run in which one rank raises at a moment, or all go on until somebody does something to one of them."""
    told = 0

    def tell(doing):
        nonlocal told
        rank.tell(doing)
        told += 1
        if rank.rank == who and told >= moment:
            Path(begun).touch()
        time.sleep(0.01)
        if kind == "raise" and rank.rank == who and told == moment:
            raise ValueError("made on purpose")

    slow = Rank(rank.rank, rank.world, tell)
    for _ in trainer(slow, "pp=2", "dualpipe", out=out, steps=100):
        pass


def go_on(rank, folders, steps):
    """Resume each run until it has so many steps."""
    return [_until(rank, folder, steps) for folder in folders]


def _until(rank, folder, steps):
    made = trainer(rank, "pp=2", "dualpipe", out=folder, steps=100)
    begun_at, records = made.steps_done, []
    while made.steps_done < steps:
        records.append(made.step())
    return begun_at, records
