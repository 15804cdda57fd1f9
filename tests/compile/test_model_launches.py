"""What a small model launches, compiled for Hopper: the interpreter takes shapes that the hardware would refuse."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3lib.kernels.toolchain import language
from dsv3lib.kernels.toolchain.language import jit, tl

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")

ROOT = Path(__file__).parents[2]
HOPPER = 90
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def compiled(kernel: Any, arguments: dict[str, list], options: dict[str, int]) -> Any:
    """Compiles one launch as Triton would on a Hopper GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        kind, value, divides = arguments.get(parameter.name, ("constant", parameter.default, False))
        if kind == "dtype":
            value = getattr(tl, DTYPES.get(value, value))
        if parameter.is_constexpr or kind in ("constant", "dtype") or (kind, value) == ("int", 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        narrow = "i32" if kind == "int" and abs(value) < 2**31 else "i64"
        signature[parameter.name] = narrow if kind == "int" else value
        if divides:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return language.triton.compile(source, GPUTarget("cuda", HOPPER, 32), options)


def test_what_a_small_model_launches_compiles_for_hopper(tmp_path):
    """In BF16 where it ran in FP16: the interpreter's BF16 products are garbage, and their shapes are the same."""
    file = tmp_path / "launches.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    recorder = Path(__file__).with_name("model_launches.py")
    run = subprocess.run(
        [sys.executable, recorder, file],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    launches = json.loads(file.read_text(encoding="utf-8").replace("fp16", "bf16"))
    names = {json.loads(launch)[1] for launch in launches}
    assert {"gate_kernel", "mla_decode_kernel", "mla_prefill_kernel", "grouped_rows_kernel"} <= names
    refused, done = [], set()
    for launch in launches:
        module, name, arguments, options = json.loads(launch)
        kernel = getattr(importlib.import_module(module), name)
        # Sizes that are no constants make no other code.
        free = {p.name for p in kernel.params if not p.is_constexpr}
        same = {
            k: (v[0], v[1] == 1, v[2]) if v[0] == "int" and k in free else v for k, v in arguments.items()
        }
        if (key := json.dumps([name, same, options], sort_keys=True)) in done:
            continue
        done.add(key)
        try:
            compiled(kernel, arguments, options)
        except Exception as error:  # the compiler raises many kinds
            refused.append(f"{name} {arguments}: {str(error).splitlines()[-1]}")
    assert not refused


@jit
def _too_small_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, tl.dot(x, x).to(x.dtype))


def test_a_product_too_small_for_the_hardware_is_refused():
    """The interpreter multiplies 2 x 2 matrices; the compiler does not."""
    launch = {"x_ptr": ["typed", "*bf16", True], "N": ["int", 2, False]}
    with pytest.raises(Exception, match="dot|shape"):
        compiled(_too_small_kernel, launch, {"num_warps": 4})
    compiled(_too_small_kernel, launch | {"N": ["int", 16, True]}, {"num_warps": 4})
