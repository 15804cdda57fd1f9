"""A look at every module of a model: which are exactly what they were built as, and which somebody touched.

The look takes a millisecond, and a token may take less than half of that. So it is kept, with what is needed to
see in a few microseconds that nothing has changed since: ``Snapshot``.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from types import MappingProxyType

from torch import nn

from ..intact import global_hooks, hooks_of, why_touched
from ..layers.attention import MultiHeadLatentAttention
from ..layers.block import Block
from ..layers.decoder import Decoder
from ..layers.experts import MLP, Experts, MixtureOfExperts
from ..layers.mtp import MTPModule, SharedHead
from ..layers.norm import RMSNorm
from ..layers.rope import RotaryEmbedding
from ..layers.router import Router
from ..linear import Linear

BUILT_AS = MappingProxyType(
    {
        "model": (Decoder,),
        "layers": (nn.ModuleList,),
        "embed_tokens": (nn.Embedding,),
        "self_attn": (MultiHeadLatentAttention,),
        "mlp": (MLP, MixtureOfExperts),
        "gate": (Router,),
        "experts": (Experts,),
        "shared_experts": (MLP,),
        "shared_head": (SharedHead,),
        "rope": (RotaryEmbedding,),
        "norm": (RMSNorm,),
    }
    | dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (RMSNorm,))
    | dict.fromkeys(("q_a_layernorm", "kv_a_layernorm", "enorm", "hnorm"), (RMSNorm,))
    | dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), (Linear,))
    | dict.fromkeys(("gate_proj", "up_proj", "down_proj", "eh_proj", "lm_head"), (Linear,))
)
"""What stands at each name in a model that nobody touched; a number is a block."""
NO_BIAS = frozenset({"q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "down_proj", "eh_proj", "lm_head"})
BLOCKS = (Block, MTPModule)
FORWARDS = MappingProxyType(
    {kind: kind.forward for kinds in (*BUILT_AS.values(), BLOCKS) for kind in kinds}
)
"""Each class's own ``forward``, as it was imported: a class may be patched too."""


class Survey:
    """What was found, module by module.

    Args:
        model: looked at, all its children.

    Attributes:
        touched: what was done to a module; it is always called.
        aside: these, and modules that no fast form may pass by for another reason: a recipe that is not plain, or a
            child that is one of these.
        names: of all modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules() if name}
        everywhere = "hooks hang on all modules" if global_hooks() else None
        self.touched: dict[nn.Module, str] = {}
        for module, name in self.names.items():
            role = name.rpartition(".")[2]
            kinds = BLOCKS if role.isdigit() else BUILT_AS.get(role)
            why = everywhere
            if kinds is not None and why is None:
                why = why_touched(module, kinds, FORWARDS.get(type(module)))
            if why is None and role in NO_BIAS and module.bias is not None:
                why = "was given a bias"
            if why is not None:
                self.touched[module] = why
        self.aside = dict(self.touched)
        for module in self.names:
            if module not in self.aside and (recipe := _other_recipe(module)) is not None:
                self.aside[module] = f"its products are made by the recipe '{recipe}'"
        for module in self.names:
            for child in module.children() if isinstance(module, MLP) else ():
                if module not in self.aside and child in self.aside:
                    self.aside[module] = f"its {self.names[child].rpartition('.')[2]} {self.aside[child]}"


def _other_recipe(module: nn.Module) -> str | None:
    """The name of a recipe at this module that is not plain."""
    for attribute in recipe_attributes(module):
        recipe = getattr(module, attribute)
        if not recipe.plain:
            return recipe.name
    return None


def recipe_attributes(module: nn.Module) -> tuple[str, ...]:
    """Which attributes of a module hold recipes."""
    return ("recipe",) if isinstance(module, Linear) else tuple(getattr(module, "recipes", ()))


class Snapshot:
    """Some modules as they were: whether any was replaced, wrapped, patched or hooked since, or got another weight.

    It holds the dictionaries in which torch keeps children, parameters and hooks. They are torch's own affair; but to
    walk a model through ``named_modules`` takes longer than a small model's whole token, and this a fiftieth of it.

    Args:
        modules: looked at, their weights with them.
        parents: only their children are looked at.
    """

    def __init__(self, modules: list[nn.Module], parents: list[nn.Module]) -> None:
        self.modules, self._types = modules, [type(m) for m in modules]
        self._attributes = [vars(m) for m in modules]
        self._counts = [len(a) for a in self._attributes]
        hooks = [h for m in modules for h in hooks_of(m)]
        self._no_hooks, self._hooks = [h for h in hooks if not h], [h for h in hooks if h]
        self._hook_counts = [len(h) for h in self._hooks]
        self._everywhere = global_hooks()
        self._child = _Places((m._modules, name) for m in [*parents, *modules] for name in m._modules)
        self._tensors = _Places(
            (place, name) for m in modules for place in (m._parameters, m._buffers) for name in place
        )
        self._settings = _Places(
            (vars(m), name) for m in modules for name in (*recipe_attributes(m), "eps", "config") if name in vars(m)
        )

    def unchanged(self) -> bool:
        """Whether all is as it was; in place, weights may have changed."""
        return (
            not any(self._no_hooks)
            and list(map(len, self._attributes)) == self._counts
            and list(map(type, self.modules)) == self._types
            and self._child.same()
            and self._tensors.same()
            and self._settings.same()
            and all(map(is_, (k.forward for k in FORWARDS), FORWARDS.values()))
            and [len(h) for h in self._hooks] == self._hook_counts
            and global_hooks() == self._everywhere
        )


class _Places:
    """Entries of dictionaries, and what stood there."""

    def __init__(self, places: Iterator[tuple[dict, str]]) -> None:
        pairs = list(places)
        self.dicts, self.names = [d for d, _ in pairs], [n for _, n in pairs]
        self.values = [d.get(n) for d, n in pairs]

    def same(self) -> bool:
        """Whether the same still stands at every place."""
        return all(map(is_, map(dict.get, self.dicts, self.names), self.values))
