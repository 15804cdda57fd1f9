"""Who computes, chosen once a call: from the device, the dtype, what is installed, and what was done to the modules.

This file is the whole answer to "which code runs on my machine?"; ``explain`` prints it.

=========  ====================================  ===========================================================
backend    where                                 its fast forms
=========  ====================================  ===========================================================
triton     a GPU with Triton; FP32, BF16, FP16   ``kernels/``
cpu        a CPU                                 ``cpu_*.py``; few tokens of one row: ``few_tokens.py``
plain      everywhere else, and under autocast   none: ``layers/`` as it is written
=========  ====================================  ===========================================================
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.toolchain import targets
from ..layers.mtp import MTPModule
from ..layers.operations import Operations
from ..layers.step import Step
from ..linear import autocast_on
from .chosen import Chosen
from .cpu import Cpu
from .engine import Engine, is_few_tokens
from .few_blocks import FewBlocks
from .few_tokens import FewChain, FewLink, FewTokens
from .survey import Snapshot, Survey
from .triton import Triton

_ADVANCE = MTPModule.advance  # as it was imported: a class may be patched


class Plain(Chosen):
    """Plain PyTorch over a model that was looked at."""


class Machine(NamedTuple):
    """The backend for a device and a dtype, and why it is this one."""

    backend: type[Chosen]
    why: str


def machine(like: Tensor) -> Machine:
    """Which backend a tensor's device and dtype ask for.

    Args:
        like: of the device and dtype of the hidden states.
    """
    device, dtype = like.device.type, str(like.dtype).removeprefix("torch.")
    if autocast_on(like):
        return Machine(Plain, "autocast is on, which casts inside PyTorch's own operations alone")
    if targets.available(like) and like.dtype != torch.float64:
        how = "a GPU with Triton" if like.is_cuda else "a CPU, TRITON_INTERPRET=1"
        return Machine(Triton, f"{how}, {dtype}")
    if device == "cpu":
        return Machine(Cpu, f"a CPU, {dtype}")
    if like.is_cuda and like.dtype != torch.float64:
        return Machine(Plain, "a GPU, but Triton is not installed or the GPU is too old for it")
    return Machine(Plain, f"{device}, {dtype}: there is no faster backend")


class Choice:
    """Chooses for one model, and remembers what it found there until something changes.

    A model has the children ``model`` (the decoder) and ``lm_head``, and a ``config``.
    """

    def __init__(self) -> None:
        self._survey: Survey | None = None
        self._settled = False
        self._taken: dict[Hashable, FewBlocks | FewChain | None] = {}  # engines, while it is settled
        self._backends: dict[type[Chosen], Chosen] = {}

    def __reduce__(self) -> tuple:
        """A copy of a model, in memory or on disk, is looked at anew."""
        return Choice, ()

    def survey(self, model: nn.Module, mtp: bool = True) -> Survey:
        """What was done to the modules, as they are now.

        Args:
            model: as it is now.
            mtp: whether the MTP modules are asked about too.
        """
        if self._settled:
            return self._survey
        if self._survey is None or not (self._main.unchanged() and (not mtp or self._rest.unchanged())):
            self._look(model)
        return self._survey

    @contextmanager
    def settled(self, model: nn.Module, mtp: bool = True) -> Iterator[None]:
        """Look once for several calls in a row, between which nobody gets hold of the model.

        A look takes a sixth of a small model's token, and a round of speculation makes a handful of calls.

        Args:
            model: as it is now.
            mtp: whether the MTP modules run in them too.
        """
        self.survey(model, mtp)
        before, self._settled = self._settled, True
        try:
            yield
        finally:
            self._settled = before
            if not before:
                self._taken.clear()

    def backend(self, model: nn.Module, like: Tensor, mtp: bool = True) -> Chosen:
        """Who computes a call.

        Args:
            model: as it is now.
            like: of the device and dtype of its hidden states.
            mtp: whether the MTP modules run in it.
        """
        survey, kind = self.survey(model, mtp), machine(like).backend
        if kind not in self._backends:
            self._backends[kind] = kind(survey.touched, survey.aside)
            if kind is Cpu:
                self._backends[kind].link = self._link
        return self._backends[kind]

    def few_tokens(self, x: Float[Tensor, "B T D"], step: Step) -> FewTokens | None:
        """The engine for few tokens of one row, where it can take this call of the main model.

        Args:
            x: the tokens' embeddings.
            step: the facts of the call, its backend among them, which ``backend`` chose when the call began.
        """
        if type(step.backend) is not Cpu or not is_few_tokens(x, step):
            return None
        return self._take(None, x)

    def few_chain(self, model: nn.Module, modules: Sequence[nn.Module]) -> FewChain | None:
        """Links of the MTP chain, embedding and head as one engine, for the drafts of one row.

        Args:
            model: as it is now. modules: that draft, in their order.
        """
        if not self._settled:
            return self._chain(model, modules)
        key = tuple(modules)
        if key not in self._taken:
            self._taken[key] = self._chain(model, modules)
        return self._taken[key]

    def _chain(self, model: nn.Module, modules: Sequence[nn.Module]) -> FewChain | None:
        weight = model.model.embed_tokens.weight
        own = MTPModule.advance is not _ADVANCE or any("advance" in vars(module) for module in modules)
        if type(self.backend(model, weight)) is not Cpu or own:
            return None
        engines = [self._take(module, weight) if module in self._engines else None for module in (None, *modules)]
        return None if None in engines else FewChain(engines[0], engines[1:], weight)

    def few_token_engines(self, model: nn.Module) -> dict[nn.Module, Engine]:
        """The few-token engines of the main model and of each MTP module."""
        self.survey(model)
        return {model if module is None else module: engine for module, engine in self._engines.items()}

    def _link(self, module: nn.Module, x: Tensor) -> FewLink | None:
        return self._take(module, x) if module in self._engines else None

    def _take(self, module: nn.Module | None, x: Tensor) -> FewBlocks | None:
        if not self._settled:
            return self._engines[module].take(x)
        if module not in self._taken:
            self._taken[module] = self._engines[module].take(x)
        return self._taken[module]

    def _look(self, model: nn.Module) -> None:
        decoder, survey = model.model, Survey(model)
        n_main = getattr(decoder, "n_main", 0)
        blocks = list(decoder.layers.children()) if hasattr(decoder, "layers") else []
        own = {model, decoder, *(m for b in blocks for m in b.modules())}
        main = [m for b in blocks[:n_main] for m in b.modules()]
        main += [decoder, *(m for m in model.modules() if m not in own)]
        rest = [m for b in blocks[n_main:] for m in b.modules()]
        self._main, self._rest = Snapshot(main, [model]), Snapshot(rest, [])
        config = model.config

        def why_not(modules: list[nn.Module]) -> str | None:
            found = ((survey.names[m], survey.aside.get(m) or _other_setting(m, config)) for m in modules)
            return next((f"{name}: {why}" for name, why in found if why), None)

        read = [m for m in main if not isinstance(m, nn.Embedding)]
        make = partial(FewTokens, config, decoder, model.lm_head)
        self._engines: dict[nn.Module | None, Engine] = {None: Engine(read, why_not(main), make)}
        for module in blocks[n_main:]:
            modules = list(module.modules())
            self._engines[module] = Engine(modules, why_not(modules), partial(FewLink, config, module))
        self._survey, self._backends = survey, {}


def _other_setting(module: nn.Module, config: ModelConfig) -> str | None:
    """What a module has that differs from the model's configuration, which the few-token engine reads."""
    own = vars(module)
    if own.get("config", config) is not config:
        return "has another configuration than the model"
    if own.get("eps", config.rms_norm_eps) != config.rms_norm_eps:
        return f"has eps {own['eps']}, the configuration {config.rms_norm_eps}"
    return None


def choose(like: Tensor) -> Operations:
    """Who computes for single layers that belong to no model, all of them as they were built.

    Args:
        like: of the device and dtype of the hidden states.
    """
    return machine(like).backend()
