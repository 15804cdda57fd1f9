"""``model.explain()``: which backend computes each operation here, and why, read off the chooser's own decisions."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..layers.attention import MultiHeadLatentAttention
from ..layers.experts import MLP, Experts
from ..layers.norm import RMSNorm
from ..layers.router import Router
from ..linear import Linear
from .choice import Machine, machine
from .chosen import Chosen
from .cpu import Cpu
from .engine import MOST_TOKENS, Engine

if TYPE_CHECKING:
    from .choice import Choice

KINDS = {RMSNorm: "RMSNorm", Router: "gate", Experts: "routed experts", MLP: "SwiGLU network"}


@dataclass(frozen=True)
class Line:
    """Who computes one operation, at some modules that are treated alike.

    Args:
        operation: what is computed.
        backend: "plain", "cpu" or "triton".
        why: which fast form, or why none.
        modules: their names in the model.
    """

    operation: str
    backend: str
    why: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """All decisions about one model, as a table.

    Args:
        machine: the backend that device and dtype ask for, and why.
        lines: one for each operation, and one more for each module that is treated otherwise.
    """

    machine: Machine
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, model: nn.Module, choice: Choice) -> Explanation:
        """What ``choice`` decides about a model as it is now.

        Args:
            model: a ``DeepSeekV3``.
            choice: its own.
        """
        like = model.model.embed_tokens.weight.detach()
        found = machine(like)
        names = choice.survey(model).names
        lines = list(_lines(model, choice, choice.backend(model, like), like))
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for operation, backend, why, module in lines:
            grouped.setdefault((operation, backend, why), []).append(names.get(module, ""))
        return cls(found, tuple(Line(*key, tuple(n for n in found if n)) for key, found in grouped.items()))

    def short(self) -> str:
        """One sentence: the backend and what it has a fast form for."""
        fast = dict.fromkeys(line.operation for line in self.lines if line.backend != "plain")
        return f"{self.machine.backend.name} ({self.machine.why}): {', '.join(fast) or 'no fast form'}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Operation, backend, modules and reason of each line, as they are printed."""
        return [(line.operation, line.backend, _where(line.modules), line.why) for line in self.lines]

    def __str__(self) -> str:
        rows = [("operation", "backend", "where", "how, or why not"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in rows]
        return "\n".join([f"{self.machine.backend.name}: {self.machine.why}", *table])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{c}</th>" for c in ("operation", "backend", "where", "how, or why not"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        title = html.escape(f"{self.machine.backend.name}: {self.machine.why}")
        return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>"


def _lines(
    model: nn.Module, choice: Choice, backend: Chosen, like: Tensor
) -> Iterator[tuple[str, str, str, nn.Module]]:
    """(operation, backend, why, module) one by one."""
    survey = choice.survey(model)
    for module, engine in choice.few_token_engines(model).items():
        operation = "few tokens of one row" if module is model else "MTP module over few tokens"
        yield operation, *_few_tokens(engine, backend, like), module
    for module, name in survey.names.items():
        role = name.rpartition(".")[2]
        if role == "self_attn":
            yield from _attention(module, backend, survey.aside)
            continue
        kind = _kind(module, role)
        if kind is None:
            if module in survey.touched and not isinstance(module, Linear):
                yield role, "plain", survey.touched[module], module
            continue
        how = backend.replaces.get(kind)
        if module in survey.aside:
            yield KINDS[kind], "plain", survey.aside[module], module
        elif how is None or not backend.takes(kind, like):
            yield KINDS[kind], "plain", "PyTorch is the form for this machine and dtype", module
        else:
            yield KINDS[kind], backend.name, how, module
    for module in survey.names:
        if isinstance(module, nn.Linear):
            recipe = getattr(module, "recipe", None)
            name = "its own" if recipe is None else recipe.name
            why = survey.touched.get(module) or f"PyTorch's product, recipe {name}"
            yield "linear layer", "plain", why, module


def _few_tokens(engine: Engine, backend: Chosen, like: Tensor) -> tuple[str, str]:
    why_not = engine.why_not(like) if type(backend) is Cpu else "it is made for a CPU"
    if why_not is not None:
        return "plain", why_not
    if engine.nbytes:
        copies = f"copies of the weights in FP32, {engine.nbytes / 2**20:.1f} MiB"
        return backend.name, f"any number, all layers at once, in NumPy, from {copies}"
    return backend.name, f"up to {MOST_TOKENS}, all layers at once, in NumPy"


def _attention(
    module: nn.Module, backend: Chosen, aside: dict[nn.Module, str]
) -> Iterator[tuple[str, str, str, nn.Module]]:
    if not isinstance(module, MultiHeadLatentAttention):
        yield "attention", "plain", aside[module], module
        return
    touched = f"; the module {aside[module]}" if module in aside else ""
    yield "attention, expanded", backend.attention[0], backend.attention[1] + touched, module
    if module.kv_b_proj in aside or not backend.may_absorb(module):
        why = f"expanded, for kv_b_proj {aside.get(module.kv_b_proj, 'has another recipe')}"
        yield "attention, absorbed", "plain", why, module
    else:
        yield "attention, absorbed", backend.decoding[0], backend.decoding[1] + touched, module


def _kind(module: nn.Module, role: str) -> type[nn.Module] | None:
    """Which operation stands at a module's name, whatever somebody put there."""
    if role.endswith("norm"):
        return RMSNorm
    named = {"gate": Router, "experts": Experts, "shared_experts": MLP}
    if role == "mlp":
        return MLP if isinstance(module, MLP) else None
    return named.get(role)


def _where(modules: tuple[str, ...]) -> str:
    """One name, or how many."""
    return modules[0] if len(modules) == 1 else f"{len(modules)} modules" if modules else "the model"
