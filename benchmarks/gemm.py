"""A linear layer's three products by oneDNN and by torch's own BLAS, in FP32 on a CPU: which is quicker here.

    python benchmarks/gemm.py            # about a minute; writes data/results/gemm-<date>.json
    python benchmarks/gemm.py --quick    # a few seconds; writes nothing unless --out is given

``dsv3lib.gemm`` chooses by the processor's maker and vector instructions; this measures what it goes by. Shapes are
those of a training step, of a prompt and of one expert's rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from measure import Timing, command_line, interleave, keep, machine
from rich.console import Console
from rich.table import Table

from dsv3lib import gemm, openmp

ROWS = (2048, 512, 128)
WEIGHTS = ((256, 704), (704, 256), (256, 256), (64, 512), (96, 384))  # [I, O]
KINDS = ("forward", "input gradient", "weight gradient")
TOLERANCE = 1e-5  # of the largest value: FP32 sums in another order


def operands(kind: str, rows: int, width: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two operands of one of the products, as they lie in memory in a step."""
    x, weight, grad = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
    return {"forward": (x, weight.t()), "input gradient": (grad, weight), "weight gradient": (grad.t(), x)}[kind]


def both(a: torch.Tensor, b: torch.Tensor, budget_s: float) -> dict[str, Timing]:
    """Either library in turn.

    Raises:
        ValueError: they do not agree.
    """
    exact, found = torch.mm(a, b), gemm.mm(a, b)
    if not (found - exact).abs().max() <= TOLERANCE * exact.abs().max():
        raise ValueError("the two libraries' products differ")
    return interleave({"BLAS": lambda: torch.mm(a, b), "oneDNN": lambda: gemm.mm(a, b)}, budget_s, least=5, warm_up=3)


def columns(quick: bool) -> Iterator[dict[str, Any]]:
    """Each product, in one thread and in all."""
    torch.manual_seed(0)
    most = torch.get_num_threads()
    for threads, rows, (width, out), kind in itertools.product(
        sorted({1, most}), ROWS[1:2] if quick else ROWS, WEIGHTS[:1] if quick else WEIGHTS, KINDS
    ):
        torch.set_num_threads(threads)
        timings = both(*operands(kind, rows, width, out), 0.1 if quick else 0.5)
        seconds = {name: timing.median for name, timing in timings.items()}
        yield {
            "product": kind, "rows": rows, "weight": [out, width], "threads": threads,
            "gflops": {name: round(2e-9 * rows * width * out / s, 1) for name, s in seconds.items()},
            "times_as_quick": round(seconds["BLAS"] / seconds["oneDNN"], 3),
        }  # fmt: skip
    torch.set_num_threads(most)


def run(quick: bool) -> dict[str, Any]:
    """Measure, show the table, return the results for the file."""
    if not gemm.has_onednn():
        raise SystemExit("this build of torch has no oneDNN: there is nothing to compare")
    about = machine()
    with mock.patch.object(gemm, "by_onednn", lambda: True):  # to measure it wherever it is
        found = list(columns(quick))
    shown = Table(title=f"Products of FP32 matrices (dsv3lib takes {about['large_products_by']} here)")
    for name in ("product", "rows", "weight", "threads", "BLAS GFLOP/s", "oneDNN GFLOP/s", "times as quick"):
        shown.add_column(name, justify="left" if name == "product" else "right")
    for c in found:
        gflops = (f"{c['gflops'][name]:.0f}" for name in ("BLAS", "oneDNN"))
        size = "x".join(map(str, c["weight"]))
        shown.add_row(c["product"], str(c["rows"]), size, str(c["threads"]), *gflops, f"{c['times_as_quick']:.2f}")
    Console(width=110).print(shown)
    return {"what": "products of FP32 matrices by oneDNN and by torch's BLAS", "machine": about, "columns": found}


def main() -> None:
    """The command line."""
    chosen = command_line(__doc__, "gemm", "one shape").parse_args()
    torch.set_num_threads(chosen.threads)
    print(openmp.settle(chosen.threads))
    keep(run(chosen.quick), "gemm", chosen)


if __name__ == "__main__":
    main()
