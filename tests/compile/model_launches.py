"""Runs a small model in Triton's interpreter and writes down how it launches each kernel: a program for a subprocess.

Triton decides when it is imported whether it interprets or compiles, so that who launches and who compiles are two
processes: ``TRITON_INTERPRET=1 python model_launches.py launches.json``.
"""

import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig, kernels
from dsv3lib.kernels.toolchain.aot import LAUNCH_OPTIONS
from dsv3lib.kernels.toolchain.language import TensorDescriptor, tl

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def described(value: Any) -> tuple[str, Any, bool]:
    """How Triton would take an argument: its class, its type or value, and whether it divides by 16."""
    if isinstance(value, torch.Tensor):
        return "typed", f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return "typed", f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, tl.dtype):
        return "dtype", str(value), False
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value, value % 16 == 0
    return ("typed", "fp32", False) if isinstance(value, float) else ("constant", value, False)


class Recorded:
    """Stands before a kernel and writes down its launches."""

    def __init__(self, kernel: Any, module: str, name: str, launches: set[str]) -> None:
        self.kernel, self.module, self.name, self.launches = kernel, module, name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*positional: Any, **named: Any) -> None:
            names = list(inspect.signature(self.kernel.fn).parameters)
            given = dict(zip(names, positional, strict=False)) | {
                k: v for k, v in named.items() if k in names
            }
            options = {k: v for k, v in named.items() if k in LAUNCH_OPTIONS}
            arguments = {k: described(v) for k, v in given.items()}
            self.launches.add(json.dumps([self.module, self.name, arguments, options], sort_keys=True))
            self.kernel[grid](*positional, **named)

        return launch


def record() -> set[str]:
    """Training, prefill and decoding of the nano model, in FP32 and in 16 bits."""
    launches: set[str] = set()
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(kernel, "fn"):
                setattr(module, name, Recorded(kernel, kernel.fn.__module__, name, launches))
    config = ModelConfig.preset("nano").replace(num_hidden_layers=2, vocab_size=64)
    ids = torch.arange(10).view(2, 5)
    for dtype in (torch.float32, torch.float16):
        model = DeepSeekV3(config, generator=torch.Generator().manual_seed(0)).to(dtype)
        model(ids, labels=ids).loss.backward()
        cache = LatentCache(config)
        with torch.no_grad():
            model(ids, cache=cache)
            model(ids[:, :1], cache=cache)
            cache.crop(torch.tensor([3, 5]))
            model(ids[:, :2], cache=cache)
    return launches


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(sorted(record())), encoding="utf-8")
