"""The running average of the weights, kept on the CPU beside the model in training (paper §3.2.3).

The average shows early how well the model will do once the learning rate has decayed; on the CPU it costs the
accelerator no memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import TrainingError


class WeightAverage:
    """ē ← d·ē + (1 − d)·w after every step, in FP32 on the CPU.

    Early on the decay is held down to (1 + t) / (10 + t), so that a short run's average is not made of its
    random beginning.

    Args:
        model: the module whose parameters are averaged. Buffers (the routers' biases) are not: they are
            integrals already, and are taken as they stand.
        decay: d, below 1.
        leave_out: names of parameters whose average another rank keeps.
    """

    def __init__(self, model: nn.Module, decay: float, leave_out: Collection[str] = ()) -> None:
        self.decay = decay
        self.count = 0
        self.tensors: dict[str, Tensor] = {
            name: p.detach().to(device="cpu", dtype=torch.float32, copy=True)
            for name, p in model.named_parameters()
            if name not in leave_out
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now."""
        self.count += 1
        weight = 1.0 - min(self.decay, (1 + self.count) / (10 + self.count))
        weights = dict(model.named_parameters())
        now = [weights[name].detach().to(device="cpu", dtype=torch.float32) for name in self.tensors]
        torch._foreach_lerp_(list(self.tensors.values()), now, weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again, bit for bit.

        Raises:
            TrainingError: some of them are another rank's.
        """
        for name, _ in model.named_parameters():
            if name not in self.tensors:
                raise TrainingError(f"{name}: another rank keeps its average; resume the run in one process")
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        try:
            self._write(model, self.tensors)
            yield
        finally:
            self._write(model, own)

    @staticmethod
    @torch.no_grad()
    def _write(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
