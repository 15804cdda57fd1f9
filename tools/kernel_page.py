"""Fills docs/kernels.md: the two numbers of each kernel, what its code holds, and what was measured.

    python tools/kernel_page.py          # writes the tables between their marks
    python tools/kernel_page.py --check  # status 1 if the page is not what it would write

The prose is written by hand; every table in it is computed here, so that none can grow stale unseen.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from dsv3lib.files import write_whole
from dsv3lib.kernels.toolchain import aot
from dsv3lib.kernels.toolchain.command import Line, line_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
MEMORY, BF16, FP8 = 4.8e12, 989e12, 1979e12  # bytes and operations a second: an H200's data sheet
GENERATION = "sm_90"

# Operation, shape, bytes through memory, operations, rate of its matrix products (0: none to speak of).
Numbers = tuple[str, str, float, float, float]


def numbers() -> Iterator[Numbers]:
    """The two numbers of each kernel at V3's sizes."""
    t, d, heads, c, r, n, v = 32768, 7168, 128, 512, 64, 128, 128
    yield "quantize_tiles", f"{t} × {d}", t * d * (2 + 1 + 4 / 128), 0, 0
    yield "quantize_tiles_both", f"{t} × {d}", t * d * (2 + 2 + 8 / 128), 0, 0
    yield "rms_norm_quantize", f"{t} × {d}", t * d * (2 + 1 + 4 / 128), 0, 0
    for m, out, k in ((4096, 24576, 7168), (64, 24576, 7168)):
        yield "gemm_fp8", f"{m} × {out} × {k}", m * k + out * k + 2 * m * out, 2 * m * out * k, FP8
    groups, out, k = 256, 4096, 7168
    for rows in (32768, 8 * 32768):
        moved = 2 * (rows * k + groups * out * k + rows * out)
        yield "grouped_gemm, bf16", f"{rows} rows, {groups} × {out} × {k}", moved, 2 * rows * out * k, BF16
        moved = rows * k + groups * out * k + 2 * rows * out
        yield "grouped_gemm_fp8", f"{rows} rows, {groups} × {out} × {k}", moved, 2 * rows * out * k, FP8
    batch, context = 128, 8192
    for h in (heads, 16):
        flops = 2 * batch * context * h * (2 * c + r)
        rest = 2 * batch * h * (2 * c + r)
        yield (
            "mla_decode, bf16",
            f"{batch} × {context}, {h} heads",
            batch * context * 2 * (c + r) + rest,
            flops,
            BF16,
        )
    stored = c + 4 * c // 128 + 2 * r
    yield (
        "mla_decode, FP8 cache",
        f"{batch} × {context}, 16 heads",
        batch * context * stored + rest,
        flops,
        BF16,
    )
    length = 4096
    moved = 2 * length * heads * (2 * (n + r) + 2 * v)
    flops = 2 * length * length / 2 * heads * (n + r + v)
    yield "mla_prefill", f"{length} tokens, {heads} heads", moved, flops, BF16
    yield "mla_prefill, backward", f"{length} tokens, {heads} heads", 2 * moved, 2.5 * flops, BF16
    yield "gate", f"{t} × 256, 8 chosen", t * (4 * 256 + 8 * (8 + 4)), 0, 0
    yield "permute and unpermute", f"{t} × {d}, 8 visits", 2 * t * d * (1 + 8 + 8 + 1), 0, 0
    yield "rms_norm", f"{t} × {d}", 2 * t * d * 2, 0, 0
    yield "swiglu", f"{t} × 2048", 2 * t * 2048 * 3, 0, 0
    yield "rope, in place", f"{t} × {heads} heads", 2 * 2 * t * (heads + 1) * r + 8 * t * r // 2, 0, 0


def table_of_numbers() -> str:
    """Bytes, operations, their quotient, the least time, and which of the two sets it."""
    rows = []
    for name, shape, moved, flops, rate in numbers():
        by_memory, by_matrix = moved / MEMORY, flops / rate if rate else 0.0
        limit = "arithmetic" if by_matrix > by_memory else "memory"
        intensity = f"{flops / moved:,.0f}" if flops else "–"
        work = f"{flops / 1e12:,.2f}" if flops else "–"
        least = f"{1e6 * max(by_memory, by_matrix):,.0f}"
        rows.append([f"`{name}`", shape, f"{moved / 1e9:,.2f}", work, intensity, least, limit])
    head = ["kernel", "at V3's size", "GB moved", "TFLOP", "FLOP per byte", "least µs", "limit"]
    return markdown(head, rows, "llrrrrl")


def chosen() -> list[aot.Build]:
    """What the page shows: every matrix kernel, and of each other operation its first form."""
    seen, builds = set(), []
    for build in aot.builds(generations=(GENERATION,)):
        operation = build.specimen.operation
        if build.specimen.matrix or operation not in seen:
            builds.append(build)
        seen.add(operation)
    return builds


def table_of_code(lines: Sequence[Line]) -> str:
    """What the code for Hopper holds."""
    rows = [
        [
            f"`{line.operation}` {line.variant}".strip(),
            line.settings.replace("_", r"\_"),
            str(line.registers),
            str(line.spilled),
            f"{line.shared / 1024:.0f}",
            line.instruction or "–",
        ]
        for line in lines
    ]
    head = ["kernel", "settings", "registers", "spilled", "shared KiB", "matrix instruction"]
    return markdown(head, rows, "llrrrl")


def table_of_measurements(folder: Path) -> str:
    """The newest results of each GPU; without any, that sentence."""
    newest = {}
    for file in sorted(folder.glob("gpu-*.json"), key=lambda file: file.stem[-10:]):
        result = json.loads(file.read_text(encoding="utf-8"))
        newest[result["machine"]["gpu"]] = result
    parts = []
    for gpu, result in newest.items():
        machine, limits = result["machine"], result["limits"]
        parts.append(
            f"**{gpu}**, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}, "
            f"{machine['date'][:10]}; in the same run {limits['copy_gb_per_s']:,.0f} GB/s of copying, "
            f"{limits['bf16_tflops']:,.0f} TFLOP/s in bf16, {limits['fp8_tflops']:,.0f} in FP8."
        )
        rows = [
            [
                case["name"],
                f"{min(case['us']):,.1f}",
                f"{case['tflops']:,.0f}" if case["tflops"] else "–",
                f"{case['gb_per_s']:,.0f}",
                f"{case['share_of_limit']:.0%}",
                ", ".join(f"{name} {peer['times']:.2f}×" for name, peer in case["peers"].items()) or "–",
            ]
            for case in result["cases"]
            if "us" in case
        ]
        head = ["kernel", "µs", "TFLOP/s", "GB/s", "of the machine's limit", "times as fast as"]
        parts.append(markdown(head, rows, "lrrrrl"))
    return "\n\n".join(parts) or "No kernel has run on a GPU yet, so no speed is claimed."


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    """A table in Markdown."""
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its marks, ``<!-- name -->`` and ``<!-- /name -->``."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        page, found = re.subn(pattern, lambda m, table=table: m[1] + table + m[2], page, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{PAGE.name}: expected the marks of {name!r} once, found them {found} times")
    return page


def main(words: Sequence[str]) -> int:
    """Writes the page, or says whether it is up to date."""
    lines = [line_of(build) for build in tqdm(chosen(), "compiling", leave=False)]
    tables = {
        "numbers": table_of_numbers(),
        "code": table_of_code(lines),
        "measured": table_of_measurements(ROOT / "data" / "results"),
    }
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page, tables)
    if "--check" in words:
        if page != wanted:
            print(f"{PAGE.name} is stale: python tools/kernel_page.py writes it anew", file=sys.stderr)
        return int(page != wanted)
    write_whole(PAGE, wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
