"""Every kernel at every setting that ships, compiled with no GPU: does it fit, spill, and use the matrix units?"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dsv3lib.errors import KernelError
from dsv3lib.kernels.toolchain import aot, language, tuning
from dsv3lib.kernels.toolchain.language import jit, row_offset, tl

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")

HOPPER = "sm_90"
BUILDS = list(aot.builds()) if language.INSTALLED else []


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_what_ships_is_sound(build):
    made = aot.compile_build(build)
    assert flaws(made) == []


@pytest.mark.parametrize("generation", tuning.GENERATIONS)
def test_every_operation_has_settings_for_every_generation(generation):
    needed = {
        b.specimen.operation
        for b in BUILDS
        if not (b.specimen.fp8 and int(generation.removeprefix("sm_")) < aot.FIRST_FP8)
    }
    there = {b.specimen.operation for b in BUILDS if b.generation == generation}
    assert needed and needed == there


def flaws(made: aot.Compiled) -> list[str]:
    """What forbids shipping: each fault in words."""
    found = []
    generation, matrix = made.build.generation, made.build.specimen.matrix
    if made.shared > aot.SHARED_LIMIT[generation]:
        found.append(f"{made.shared} bytes of shared memory, {aot.SHARED_LIMIT[generation]} is the most")
    if generation == HOPPER and made.spilled:
        found.append(f"{made.spilled} bytes a thread spilled")
    if generation == HOPPER and matrix:
        operand = {"bf16": "bf16", "fp8": "e4m3"}[matrix]
        if "wgmma" not in made.instruction or operand not in made.instruction:
            found.append(f"matrix instruction {made.instruction!r}, expected wgmma with {operand}")
    found += [f"32-bit product with a stride: {line}" for line in narrow_strides(made.ttir)]
    return found


def narrow_strides(ttir: str) -> list[str]:
    """Lines that multiply by an argument named ``stride_*`` in 32 bits, also after it was spread over a tile.

    At V3's sizes such a product passes 2^31 and the kernel reads elsewhere; no small test shows it.
    """
    tainted = set(re.findall(r"%(stride_\w+)", ttir))
    lines = [line.split(" loc(")[0].strip() for line in ttir.splitlines()]
    grown = True
    while grown:
        before = len(tainted)
        for line in lines:
            made = re.match(r"%([\w#]+) = tt\.(?:splat|broadcast|expand_dims|reshape) %([\w#]+)", line)
            if made and made[2] in tainted:
                tainted.add(made[1])
        grown = len(tainted) > before
    products = [
        line for line in lines if "arith.muli" in line and re.search(r": (?:tensor<.*x)?i32>?$", line)
    ]
    return [line for line in products if tainted & set(re.findall(r"%([\w#]+)", line.split("=", 1)[1]))]


# The checks above must be able to fail: kernels that have each fault.

TYPES = {"x_ptr": "*fp32", "y_ptr": "*fp32", "stride_x": "i32"}


@jit
def _careless_kernel(x_ptr, y_ptr, stride_x, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + rows, tl.load(x_ptr + rows * stride_x))


@jit
def _wrong_callee(x):
    return x.no_such_thing()


@jit
def _calling_kernel(x_ptr, stride_x, BLOCK: tl.constexpr):
    tl.store(x_ptr, _wrong_callee(tl.load(x_ptr)))


@jit
def _careful_kernel(x_ptr, y_ptr, stride_x, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + rows, tl.load(x_ptr + row_offset(rows, stride_x)))


@jit
def _greedy_kernel(x_ptr, y_ptr, stride_x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, y, input_precision="ieee"))


def made_of(kernel, block, matrix=None, **options):
    specimen = aot.Specimen("none", kernel, TYPES, matrix=matrix)
    row = {"when": {}, "BLOCK": block, "num_warps": 1, "num_stages": 1, **options}
    return aot.compile_build(aot.Build(specimen, HOPPER, row))


def test_a_product_in_32_bits_is_seen_and_one_in_64_is_not():
    assert any("32-bit" in flaw for flaw in flaws(made_of(_careless_kernel, 128)))
    assert flaws(made_of(_careful_kernel, 128)) == []


def test_spills_and_a_missing_matrix_instruction_are_seen():
    found = flaws(made_of(_greedy_kernel, 32, matrix="bf16", maxnreg=24))
    assert any("spilled" in flaw for flaw in found) and any("wgmma" in flaw for flaw in found)


def test_too_much_shared_memory_is_seen():
    made = made_of(_greedy_kernel, 32, num_warps=4)
    assert 0 < made.shared < aot.SHARED_LIMIT[HOPPER]
    assert flaws(made) == []
    made = replace(made, shared=aot.SHARED_LIMIT[HOPPER] + 1)
    assert any("shared memory" in flaw for flaw in flaws(made))


def test_what_does_not_compile_is_named():
    specimen = aot.Specimen("bad", _careful_kernel, TYPES | {"x_ptr": "i32"})
    with pytest.raises(KernelError, match="bad sm_90 does not compile"):
        aot.compile_build(aot.Build(specimen, HOPPER, {"when": {}, "BLOCK": 128}))
    with pytest.raises(KernelError, match="'BLOCK'"):
        aot.compile_build(aot.Build(aot.Specimen("bad", _careful_kernel, TYPES), HOPPER, {"when": {}}))
    with pytest.raises(
        KernelError, match="(?s)because: .*no_such_thing"
    ):  # the fault lies in a called function
        made_of(_calling_kernel, 128)
