"""A notebook's last look: the kernel that does this on a GPU, what it compiles to, and what was measured of it.

Nothing here needs a GPU. The kernel is compiled for Hopper on the spot, which takes a second or two, and measured
figures come out of the files that ``benchmarks/gpu.py`` wrote, with the machine's name; where there are none, that
is what stands there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CourseError
from ..kernels.toolchain import aot, language, targets
from . import card

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
HEAD = ["kernel", "registers", "spilled", "shared", "matrix instruction"]


def at_scale(*builds: str, operations: tuple[str, ...], results: Path = RESULTS) -> None:
    """Show kernels as compiled for Hopper, and what has been measured of their operations.

    Args:
        builds: names as ``dsv3 kernels`` shows them, or their beginnings, such as "mla_decode sm_90".
        operations: whose measurements to show. results: the folder of ``gpu-*.json``.
    """
    told, rows = compiled(builds)
    lines = measured_lines(operations, results)
    plain = [told, *("; ".join(f"{h} {v}" for h, v in zip(HEAD, row, strict=True)) for row in rows), *lines]
    table = card.table(HEAD, rows) if rows else ""
    card.measured(plain, card.inline(told), table, *(f"<div>{card.inline(line)}</div>" for line in lines))


def compiled(builds: tuple[str, ...]) -> tuple[str, list[list[str]]]:
    """A sentence, and a row for each kernel: registers a thread, bytes spilled, shared memory, instruction."""
    if not language.INSTALLED:
        return "Triton exists for Linux alone, so nothing is compiled here; `dsv3 kernels` shows this table there.", []
    if targets.interpreted():
        return "TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled.", []
    shipped = list(aot.builds(generations=("sm_90",)))
    unknown = [name for name in builds if not any(build.name.startswith(name) for build in shipped)]
    if unknown:
        raise CourseError(f"at_scale: no kernel is called {' or '.join(unknown)}; `dsv3 kernels` lists them")
    chosen = [build for build in shipped if build.name.startswith(builds)]
    rows = []
    for build in chosen:
        made = aot.compile_build(build)
        name = build.name.replace(" sm_90", "")
        shared = f"{made.shared / 1024:.0f} KiB"
        rows.append([name, str(made.registers), str(made.spilled), shared, made.instruction or "–"])
    return "Compiled for Hopper just now, on this machine, without a GPU:", rows


def measured_lines(operations: tuple[str, ...], results: Path) -> list[str]:
    """One line for each measured case of these operations, newest file of each machine; or that there is none."""
    newest: dict[str, dict[str, Any]] = {}
    for file in sorted(results.glob("gpu-*.json"), key=lambda file: file.stem[-10:]):
        content = json.loads(file.read_text(encoding="utf-8"))
        newest[content["machine"]["gpu"]] = content
    lines = []
    for gpu, content in newest.items():
        for case in content["cases"]:
            if case["operation"] in operations and "us" in case:
                share = f"{case['share_of_limit']:.0%} of the machine's limit"
                peers = "".join(f", {p['times']:.2f} × {name}" for name, p in case["peers"].items())
                lines.append(f"{gpu} · {case['name']}: {min(case['us']):,.0f} µs, {share}{peers}")
    return lines or ["Measured on a GPU: not yet. No speed is claimed."]
