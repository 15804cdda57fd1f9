"""Every kernel compiled for every generation at every setting that ships, with no GPU, and what the code holds.

Triton hands PTX to an assembler that comes with it, so a laptop can make Hopper's machine code and read off what
decides its speed: registers per thread, bytes spilled out of them, shared memory, and which matrix instruction
is in it. ``dsv3 kernels`` prints this as a table; a test refuses a setting that spills or does not fit.

Each folder's ``specimens.py`` lists what is built; the settings come from ``tuned/``.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import KernelError
from . import language, targets, tuning
from .specimen import Specimen

# The families that are compiled, by the name under which ``dsv3 kernels`` takes them, and the folder of each,
# whose ``specimens.py`` has a function of that name.
FAMILIES: Mapping[str, str] = MappingProxyType({
    "quantize": "quantize", "fused_quantize": "quantize",
    "gemm": "matmul", "grouped_gemm": "matmul", "grouped_gemm_fp8": "matmul",
    "latent_format": "attention", "mla_decode": "attention", "mla_prefill": "attention",
    "routing": "moe", "elementwise": "elementwise",
})  # fmt: skip
FIRST_FP8 = 89  # the first generation with E4M3
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
# Bytes of shared memory that one block may have, by generation.
SHARED_LIMIT: Mapping[str, int] = MappingProxyType(
    {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
)
MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\S*")

_SHORT = MappingProxyType({"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync"})


@dataclass(frozen=True)
class Build:
    """A specimen with its settings and its generation: one kernel to compile."""

    specimen: Specimen
    generation: str
    row: tuning.Row

    @property
    def name(self) -> str:
        """Operation, variant, generation and bounds, as tests and the table call it."""
        parts = (self.specimen.operation, self.specimen.variant, self.generation, *self.bounds)
        return " ".join(part for part in parts if part)

    @property
    def bounds(self) -> list[str]:
        """The shapes that its row of settings is for, such as "M 65–128"."""
        ends = self.row["when"].items()
        return [f"{name} {low}" if low == high else f"{name} {low}–{high}" for name, (low, high) in ends]


@dataclass(frozen=True)
class Compiled:
    """What the machine code holds.

    Args:
        registers: per thread.
        spilled: bytes per thread kept in memory, its stack, for want of registers.
        shared: bytes of shared memory a block.
        warps: per block.
        instruction: its matrix instruction, or "".
        ttir: Triton's own code, PTX the virtual machine's.
    """

    build: Build
    registers: int
    spilled: int
    shared: int
    warps: int
    instruction: str
    ttir: str = field(repr=False, default="")
    ptx: str = field(repr=False, default="")


def builds(
    families: tuple[str, ...] = tuple(FAMILIES), generations: tuple[str, ...] = tuning.GENERATIONS
) -> Iterator[Build]:
    """Everything that ships: each specimen, each generation that has its types, each row of settings."""
    for family in families:
        specimens = importlib.import_module(f"dsv3lib.kernels.{FAMILIES[family]}.specimens")
        for specimen in getattr(specimens, family)():
            for generation in generations:
                if specimen.fp8 and int(generation.removeprefix("sm_")) < FIRST_FP8:
                    continue
                for table in tuning.shipped(generation):
                    for row in table.get(specimen.operation, []):
                        if specimen.rows(row):
                            yield Build(specimen, generation, row)


def require_compiler() -> None:
    """Refuses where nothing can be compiled.

    Raises:
        KernelError: Triton is missing or interprets.
    """
    if not language.INSTALLED:
        raise KernelError("kernels cannot be compiled: Triton is not installed (it exists for Linux alone)")
    if targets.interpreted():
        raise KernelError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it and start again")


def compile_build(build: Build) -> Compiled:
    """Compile for a generation without a GPU and read the machine code.

    Raises:
        KernelError: Triton is missing or interprets; or the kernel does not compile, with the compiler's words.
    """
    require_compiler()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    specimen, row = build.specimen, build.row
    kernel, names = specimen.kernel, specimen.kernel.arg_names
    constants = {k: v for k, v in row.items() if k in names} | dict(specimen.constants(row))
    signature = {n: "constexpr" if n in constants else _type(specimen, n, constants) for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in specimen.divisible
    }
    options = {k: v for k, v in row.items() if k in LAUNCH_OPTIONS}
    target = GPUTarget("cuda", int(build.generation.removeprefix("sm_")), 32)
    try:
        made = language.triton.compile(ASTSource(kernel, signature, constants, attributes), target, options)
    except Exception as error:  # the compiler raises many kinds, none of which names the build
        raise KernelError(f"{build.name} does not compile: {_in_full(error)}") from error
    registers, spilled, static = _resources(made.asm["cubin"])
    found = MATRIX_INSTRUCTION.findall(made.asm["ptx"])
    whole = MATRIX_INSTRUCTION.search(made.asm["ptx"])
    return Compiled(
        build,
        registers,
        spilled,
        max(static, made.metadata.shared),
        made.metadata.num_warps,
        f"{_SHORT[found[0]]}{_operands(whole.group())}" if found else "",
        made.asm["ttir"],
        made.asm["ptx"],
    )


def _in_full(error: BaseException | None) -> str:
    """The compiler's words with those of its causes: of an error in a called function it says itself only where."""
    words = []
    while error is not None:
        words.append(str(error) or repr(error))
        error = error.__cause__
    return "\nbecause: ".join(words)


def _type(specimen: Specimen, name: str, constants: Mapping[str, Any]) -> str:
    """An argument's type, with the names of constants inside a descriptor's shape replaced."""
    if name not in specimen.arguments:
        raise KernelError(f"{specimen.operation}: neither the specimen nor its settings give {name!r}")
    kind = specimen.arguments[name]
    head, bracket, shape = kind.partition("[")
    return head + bracket + re.sub(r"[A-Z]\w*", lambda m: str(constants[m.group()]), shape)


def _operands(instruction: str) -> str:
    """The types that a matrix instruction multiplies, out of its name: " bf16" or " e4m3"."""
    types = re.findall(r"\.(bf16|e4m3|e5m2|f16|tf32|s8)\b", instruction)
    if "kind::f8f6f4" in instruction:
        return " e4m3"
    if "kind::f16" in instruction:
        return " bf16"
    return f" {types[-1]}" if types else ""


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes a thread spilled, bytes a block of shared memory, from the machine code."""
    tool = language.triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run(
            [tool, "--dump-resource-usage", file], capture_output=True, text=True, timeout=60
        )
    values = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", told.stdout)}
    if told.returncode or "REG" not in values:
        raise KernelError(
            f"cuobjdump could not read the machine code: {told.stderr.strip() or told.stdout.strip()}"
        )
    return values["REG"], values["STACK"] + values["LOCAL"], values["SHARED"]
