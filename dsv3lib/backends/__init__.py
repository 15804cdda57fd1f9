"""Who computes, chosen once a call: plain PyTorch, the CPU's fast forms, or Triton's kernels (``choice``)."""

from .choice import Choice, choose

__all__ = ["Choice", "choose"]
