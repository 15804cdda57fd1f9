"""Watch the routing of a model that somebody else wrote, by forward hooks; its outputs stay what they were.

Our own model says in its output which experts it chose. In transformers a mixture layer hands the chosen
experts to a module called ``experts`` as a tensor of whole numbers (DeepSeek-V3, Mixtral, Qwen-MoE, OLMoE and
most others), and there they are read. Counted are tokens, each once: neither the padding that an
``attention_mask`` marks, nor what activation checkpointing runs again during backward, a layer or the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import InputError
from ..model import DeepSeekV3
from ..model.outputs import ModelOutput
from .load_history import LoadHistory


class Attachment:
    """Hooks on a model, and the history that they fill: one step a forward pass.

    Args:
        model: ours, or one of transformers' mixtures of experts.

    Attributes:
        on_load: called after each forward pass.

    Raises:
        InputError: the model has no mixture layer that can be watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on_load: Callable[[], None] = lambda: None
        self._domain: str | None = None
        self._pass: dict[int, np.ndarray] | None = None
        self._valid: Tensor | None = None  # of the pass under way: which positions are tokens
        if isinstance(model, DeepSeekV3):
            self.history = LoadHistory.of_model(model.config)
            self._hooks = [model.register_forward_hook(self._own_output)]
            return
        found = [
            (name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"
        ]
        sizes = {_expert_count(module) for _, module in found}
        if not found or len(sizes) != 1 or None in sizes:
            raise InputError(
                f"model: {type(model).__name__} has {len(found)} modules named 'experts' with {sizes or 'no'} "
                "experts, expected mixture layers of one size; this view reads transformers' DeepSeek-V3, "
                "Mixtral, Qwen-MoE and models built like them"
            )
        self._experts = sizes.pop()
        config = getattr(model, "config", None)
        groups = getattr(config, "n_group", None) or 1
        self.history = LoadHistory([_short(name) for name, _ in found], self._experts, groups)
        self._hooks = [
            module.register_forward_pre_hook(self._counter(row), with_kwargs=True)
            for row, (_, module) in enumerate(found)
        ]
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._end))

    def detach(self) -> None:
        """Take the hooks off; a second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """While open, passes are counted as text of this domain too."""
        before, self._domain = self._domain, name
        try:
            yield
        finally:
            self._domain = before

    def _own_output(self, _model: nn.Module, _inputs: Any, out: ModelOutput) -> None:
        if not recomputing():
            self.history.add_load(out.expert_load.cpu().numpy(), self._domain)
            self.on_load()

    def _begin(self, _model: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self._pass, self._valid = (None, None) if recomputing() else ({}, tokens_of(inputs, named))

    def _end(self, _model: nn.Module, _inputs: Any, _out: Any) -> None:
        seen, self._pass = self._pass, None
        if seen:
            nothing = np.zeros(self._experts, np.int64)
            rows = [seen.get(row, nothing) for row in range(len(self.history.layers))]
            self.history.add_load(np.stack(rows), self._domain)
            self.on_load()

    def _counter(self, row: int) -> Callable[..., None]:
        def count(_module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            if self._pass is None:  # not within a forward pass: backward is making activations again
                return
            for value in (*inputs, *named.values()):
                if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
                    chosen = value.detach().cpu()
                    if self._valid is not None and chosen.ndim > 1:
                        chosen = chosen.reshape(-1, chosen.shape[-1])
                        if len(chosen) == len(self._valid):
                            chosen = chosen[self._valid]
                    # An index beyond the experts stands for a visit that goes to another device.
                    counts = torch.bincount(chosen.flatten(), minlength=self._experts)
                    here = self._pass.get(row, np.zeros(self._experts, np.int64))
                    self._pass[row] = here + counts[: self._experts].numpy()
                    return

        return count


def recomputing() -> bool:
    """Whether backward is running, and so a forward pass makes again what has been."""
    return torch._C._current_graph_task_id() != -1


def tokens_of(inputs: tuple, named: dict[str, Any]) -> Bool[Tensor, " N"] | None:
    """Which positions of a call are tokens and no padding, row after row; ``None`` where no mask says.

    Args:
        inputs, named: the call's arguments, as transformers' models take them. The mask may be longer than the
            new tokens, where a cache holds those before.
    """
    mask = named.get("attention_mask", inputs[1] if len(inputs) > 1 else None)
    ids = next(
        (
            x
            for x in (named.get("input_ids"), named.get("inputs_embeds"), *inputs[:1])
            if isinstance(x, Tensor)
        ),
        None,
    )
    if not isinstance(mask, Tensor) or mask.ndim != 2 or ids is None or ids.ndim < 2:
        return None
    if mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
        return None
    return mask[:, mask.shape[1] - ids.shape[1] :].detach().cpu().bool().flatten()


def _expert_count(module: nn.Module) -> int | None:
    """How many experts a module holds: by its name for it, by its stacked weights, or by its children."""
    number = getattr(module, "num_experts", None)
    if isinstance(number, int):
        return number
    stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
    if len(stacked) == 1:
        return stacked.pop()
    return len(module) if isinstance(module, nn.ModuleList) and len(module) else None


def _short(name: str) -> str:
    """ "layer 3" from "model.layers.3.mlp.experts"."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else name
