"""Checkpoints: folders of safetensors with Hugging Face's names, in and out, FP8 files included.

names.py               what each stored tensor is called, and its place in the model
shards.py              sharded safetensors: the index, and which file holds which tensor
block_scales.py        FP8 weights and the scale of each block, in whatever type the file has them
reading.py             a folder into a model, tensor by tensor
writing.py             a model into a folder, whole or not at all
generation_config.py   generation_config.json: the tokens that end a text
"""

from .block_scales import FP8_BLOCK, SCALE_SUFFIX
from .generation_config import read_generation_config
from .names import Entry, copies, entries
from .reading import load, read_config
from .shards import INDEX, SINGLE
from .writing import save

__all__ = [
    "FP8_BLOCK", "INDEX", "SCALE_SUFFIX", "SINGLE", "Entry", "copies", "entries", "load", "read_config",
    "read_generation_config", "save",
]  # fmt: skip
