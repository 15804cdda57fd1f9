"""dsv3lib: DeepSeek-V3, readable and whole.

    >>> from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
    >>> model = DeepSeekV3(ModelConfig.preset("tiny"))
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import openmp as openmp  # before torch: what it sets in the environment is read when that is loaded

if TYPE_CHECKING:
    from .config import ModelConfig
    from .layers.cache import LatentCache
    from .model import DeepSeekV3
    from .model.outputs import ModelOutput
    from .rope_settings import YarnScaling

__version__ = "0.1.0"
__all__ = ["DeepSeekV3", "LatentCache", "ModelConfig", "ModelOutput", "YarnScaling", "__version__"]

# Imported at first use: `dsv3 doctor` must start where torch cannot be imported, and say so.
_HOMES = {
    "DeepSeekV3": "model",
    "LatentCache": "layers.cache",
    "ModelConfig": "config",
    "ModelOutput": "model.outputs",
    "YarnScaling": "rope_settings",
}


def __getattr__(name: str) -> object:
    """Fetches a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
