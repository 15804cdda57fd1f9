"""Whether a module still is what its class says, so that a fast form may stand in for it.

People replace layers, wrap them (LoRA), give them parametrizations, prune them, patch their ``forward``, hang hooks on
them. A fast form reads such a module's weights and never calls it, so it would compute the original in silence. A
module that was touched is therefore always called.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def hooks_of(module: nn.Module) -> list[dict]:
    """The dictionaries in which torch keeps a module's hooks, empty where it has none."""
    return [getattr(module, name) for name in _HOOKS]


def global_hooks() -> bool:
    """Whether hooks are hung on all modules at once (``torch.nn.modules.module.register_module_forward_hook``)."""
    return any(_GLOBAL_HOOKS)


def why_touched(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], forward: Callable | None = None
) -> str | None:
    """What was done to a module, in words; ``None`` if it is exactly what its class says.

    Args:
        module: looked at; its children are not.
        kinds: classes that it may be, exactly (a subclass may compute something else).
        forward: the class's own ``forward``, where somebody may have patched the class.
    """
    kind = type(module)
    if kind not in kinds:
        return f"is a {kind.__name__}, not a {' or '.join(k.__name__ for k in kinds)}"
    if forward is not None and kind.forward is not forward:
        return f"forward of {kind.__name__} is patched"
    for name, words in _HOOKS.items():
        if getattr(module, name):
            return f"has a {words}"
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and not name.startswith("_"):
            return f"{name} is no parameter (pruned?)"
        if callable(value) and callable(getattr(kind, name, None)):
            return f"{name} is patched"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    return None
