"""AdamW as DeepSeek-V3 uses it: FP32 master weights, moments in FP32 or BF16, decay on matrices only.

Written out instead of taken from torch for three reasons: it is the update itself that a learner wants to
read; the paper's mixture (FP32 master weights beside BF16 weights and BF16 moments, §3.3.3) is not one of
torch's; and its state is a flat dictionary of named tensors, which goes into a safetensors file as it is.

Which weights decay: every parameter with two dimensions or more, the embedding, the head and the router's
matrix among them, as Megatron-style trainers do; norms and biases do not. The paper gives the rate (0.1) and
not the set. A norm's gain has no scale to lose: pulling it to zero would fight the layer after it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from .settings import TrainingConfig


class AdamW:
    """Adam with decoupled weight decay over named parameters.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,
    w ← w − η·(weight_decay·w + m̂ / (√v̂ + ε)),  m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)

    Args:
        named_parameters: (name, parameter) pairs; those that need no gradient are left out.
        beta1, beta2, epsilon, weight_decay: of the update above.
        moment_dtype: ``torch.float32`` or ``torch.bfloat16`` for m and v; the arithmetic is FP32 either way.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        moment_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.count = 0
        # An FP32 parameter is its own master (and an FP64 one, in proofs); any other gets one.
        self.masters = {
            name: p.detach() if _is_wide(p) else p.detach().float() for name, p in self.parameters.items()
        }
        kinds = {n: torch.promote_types(moment_dtype, w.dtype) if w.dtype == torch.float64 else moment_dtype
                 for n, w in self.masters.items()}  # fmt: skip
        self.first = {n: torch.zeros_like(w, dtype=kinds[n]) for n, w in self.masters.items()}
        self.second = {n: torch.zeros_like(w, dtype=kinds[n]) for n, w in self.masters.items()}

    @classmethod
    def of(cls, config: TrainingConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> AdamW:
        """With a run's settings."""
        moments = torch.bfloat16 if config.bf16_moments else torch.float32
        return cls(named_parameters, config.beta1, config.beta2, config.epsilon, config.weight_decay, moments)

    @staticmethod
    def decays(parameter: Tensor) -> bool:
        """Whether weight decay applies: to matrices and stacks of matrices."""
        return parameter.ndim >= 2

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient, with learning rate η."""
        self.count += 1
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        for decays in (True, False):
            group = [name for name in names if self.decays(self.parameters[name]) == decays]
            if group:
                self._update(group, learning_rate, self.weight_decay if decays else 0.0)

    def _update(self, names: list[str], learning_rate: float, decay: float) -> None:
        weights = [self.masters[n] for n in names]
        grads = [self.parameters[n].grad.to(w.dtype) for n, w in zip(names, weights, strict=True)]
        # No copies where the moments are as wide as the master.
        first = [self.first[n].to(w.dtype) for n, w in zip(names, weights, strict=True)]
        second = [self.second[n].to(w.dtype) for n, w in zip(names, weights, strict=True)]
        torch._foreach_lerp_(first, grads, 1.0 - self.beta1)
        torch._foreach_mul_(second, self.beta2)
        torch._foreach_addcmul_(second, grads, grads, 1.0 - self.beta2)
        if decay:
            torch._foreach_mul_(weights, 1.0 - learning_rate * decay)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1.0 - self.beta2**self.count) ** 0.5)
        torch._foreach_add_(denominator, self.epsilon)
        torch._foreach_addcdiv_(weights, first, denominator, -learning_rate / (1.0 - self.beta1**self.count))
        for i, name in enumerate(names):
            if self.first[name].dtype != weights[i].dtype:
                self.first[name].copy_(first[i])
                self.second[name].copy_(second[i])
            if not _is_wide(self.parameters[name]):
                self.parameters[name].copy_(weights[i])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments, and the masters of weights that are not FP32, by name."""
        tensors = {f"first.{name}": m for name, m in self.first.items()}
        tensors |= {f"second.{name}": v for name, v in self.second.items()}
        for name, parameter in self.parameters.items():
            if not _is_wide(parameter):
                tensors[f"master.{name}"] = self.masters[name]
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], count: int) -> None:
        """Take over what ``state_tensors`` gave, after ``count`` steps.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
        """
        copy_exactly(self.state_tensors(), tensors, "optimizer state")
        self.count = count


def _is_wide(parameter: Tensor) -> bool:
    """Whether a parameter is its own master."""
    return parameter.dtype in (torch.float32, torch.float64)


@torch.no_grad()
def copy_exactly(into: dict[str, Tensor], source: dict[str, Tensor], what: str) -> None:
    """Copy named tensors in place; names, shapes and dtypes must agree.

    Copied, not swapped: a loaded tensor may sit at another alignment, and then sums come out in another
    order.

    Raises:
        CheckpointError: they do not agree; the message names the tensor.
    """
    for name in sorted(into.keys() ^ source.keys()):
        raise CheckpointError(f"{what}: tensor {name!r} is {'missing' if name in into else 'unknown'}")
    for name, tensor in into.items():
        found = source[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"{what}: tensor {name!r} is {found.dtype} {tuple(found.shape)}, "
                f"expected {tensor.dtype} {tuple(tensor.shape)}"
            )
        tensor.copy_(found)
