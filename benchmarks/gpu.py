"""Every kernel on a GPU: first whether it is right, then how fast, beside its peers and the machine's limits.

    python benchmarks/gpu.py              # under eight minutes on a Hopper; writes data/results/gpu-….json
    python benchmarks/gpu.py --tune       # first finds the fastest settings: kernels/tuned/<device>.json
    python benchmarks/gpu.py --only gemm  # cases whose name holds the word; no file unless --out is given
    python benchmarks/gpu.py --rehearse   # tiny shapes, on any machine (TRITON_INTERPRET=1): no figures

Operands are fresh random numbers. A kernel that is wrong is not timed, and the run ends with status 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_layers
import gpu_peers
import torch
from gpu_timing import Ceilings, Stopwatch, Twice, ceilings
from measure import RESULTS, commit, write_json
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dsv3lib import ModelConfig
from dsv3lib.kernels.toolchain import language, targets, tuning

LAYER_TOKENS = 4096
# Sequences and tokens of a training step; context of prefill and decoding.
SMALL_MODEL_SIZES = (8, 2048, 8192)
SMALL_MODEL = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 512,
    "num_hidden_layers": 8, "first_k_dense_replace": 1, "num_attention_heads": 16, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "kv_lora_rank": 512, "q_lora_rank": 768,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 16384,
}  # fmt: skip


def measure_case(case: gpu_cases.Case, watch: Stopwatch, limits: Ceilings | None) -> dict[str, Any]:
    """Check a case, then time it and its peers; without limits only the check is done.

    Returns:
        The case for the results file; "right" is false where the kernel was wrong and therefore not timed.
    """
    work = case.prepare(watch.device, **case.shape)
    error = work.error()
    found: dict[str, Any] = {
        "operation": case.operation,
        "name": case.name,
        "shape": dict(case.shape),
        "error": error,
        "tolerance": work.tolerance,
        "right": error <= work.tolerance,  # NaN is not
        "bound_by": work.matrix,
        "peers": {},
        "not_measured": {},
        "goals": {},
    }
    if limits is None or not found["right"]:
        return found
    took = watch.twice(work.ours)
    least = limits.seconds(work.flops, work.moved, work.matrix)
    if work.flops and work.moved / limits.copy > work.flops / max(limits.bf16, 1.0):
        found["bound_by"] = ""  # a matrix kernel that memory bounds at this shape
    rates = {"TFLOP/s": work.flops / took.seconds / 1e12, "of copy": work.moved / took.seconds / limits.copy}
    found |= timing(took) | {
        "tflops": round(rates["TFLOP/s"], 1),
        "gb_per_s": round(work.moved / took.seconds / 1e9, 1),
        "share_of_limit": round(least / took.seconds, 3),
    }
    for name, prepare in work.peers.items():
        try:
            theirs = watch.twice(prepare())
        except gpu_peers.NotMeasured as reason:
            found["not_measured"][name] = str(reason)
        else:
            found["peers"][name] = timing(theirs) | {"times": round(theirs.seconds / took.seconds, 3)}
            rates[f"times {name}"] = theirs.seconds / took.seconds
    if work.with_quantisation is not None:
        both = watch.twice(work.with_quantisation)
        found["with_quantisation"] = timing(both) | {"share_of_limit": round(least / both.seconds, 3)}
    for goal, asked in work.goals.items():
        reached = rates.get(goal)
        met = None if reached is None else reached >= asked
        found["goals"][goal] = {"asked": asked, "reached": reached and round(reached, 3), "met": met}
    return found


def measure_run(one: gpu_layers.Run, watch: Stopwatch, timed: bool) -> dict[str, Any]:
    """A layer or a model both ways; the results must agree before they are timed."""
    ours = one.call()
    with gpu_layers.plain_torch():
        error = gpu_peers.difference(ours, one.call())
    found: dict[str, Any] = {"name": one.name, "tokens": one.tokens, "error": error, "right": error <= 1e-2}
    if timed and found["right"]:
        took = watch.twice(one.call)
        with gpu_layers.plain_torch():
            plain = watch.twice(one.call)
        found |= timing(took) | {
            "tokens_per_s": round(one.tokens / took.seconds, 1),
            "plain_torch": timing(plain) | {"times": round(plain.seconds / took.seconds, 3)},
        }
    return found


def timing(took: Twice) -> dict[str, Any]:
    """Both medians in microseconds."""
    return {"us": [round(1e6 * took.first, 2), round(1e6 * took.second, 2)], "calls": took.calls}


def run(device: torch.device, only: str = "", small: bool = False) -> dict[str, Any]:
    """Check and measure everything; a rehearsal (``small``) times nothing.

    Returns:
        What goes into the results file.
    """
    began = time.perf_counter()
    watch = Stopwatch(device)
    limits = None if small else ceilings(watch)
    chosen = [case for case in gpu_cases.cases(small) if only in case.name]
    measured, runs = [], []
    for case in tqdm(chosen, "kernels", disable=not sys.stderr.isatty()):
        measured.append(measure_case(case, watch, limits))
        gc.collect()
    if not only:
        for one in tqdm(layers_and_model(device, small), "layers", disable=not sys.stderr.isatty()):
            runs.append(measure_run(one, watch, not small))
            gc.collect()
    return {
        "what": "each Triton kernel: error, time, share of the machine's limit, times as fast as peers in the same run",
        "machine": machine(device),
        "limits": limits and {
            "copy_gb_per_s": round(limits.copy / 1e9, 1),
            "bf16_tflops": round(limits.bf16 / 1e12, 1),
            "fp8_tflops": round(limits.fp8 / 1e12, 1),
        },
        "seconds": round(time.perf_counter() - began, 1),
        "cases": measured,
        "layers": runs,
    }  # fmt: skip


def layers_and_model(device: torch.device, small: bool):
    """V3's layers and a small model; in a rehearsal the nano preset for both."""
    nano = ModelConfig.preset("nano")
    wide = nano if small else ModelConfig.preset("v3-671b")
    model = nano if small else ModelConfig(**SMALL_MODEL)
    yield from gpu_layers.layers(device, wide, 8 if small else LAYER_TOKENS)
    sizes = (2, 8, 8) if small else SMALL_MODEL_SIZES
    yield from gpu_layers.end_to_end(device, model, *sizes)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none: a rehearsal in Triton's interpreter",
        "capability": list(targets.capability(device)) if on_gpu else None,
        "processors": targets.processors(device),
        "torch": torch.__version__,
        "triton": language.triton.__version__,
        "cuda": torch.version.cuda,
        "settings": list(tuning.sources(device)),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def table(results: Mapping[str, Any]) -> Table:
    """The results for a terminal."""
    shown = Table(title=f"dsv3lib on {results['machine']['gpu']}", title_justify="left")
    for heading in (
        "kernel",
        "error",
        "µs",
        "TFLOP/s",
        "GB/s",
        "of limit",
        "with quantisation",
        "peers",
        "goals",
    ):
        shown.add_column(heading, justify="left" if heading in ("kernel", "peers", "goals") else "right")
    for case in results["cases"]:
        if not case["right"]:
            shown.add_row(case["name"], f"{case['error']:.1e}", "WRONG", style="red")
            continue
        if "us" not in case:
            shown.add_row(case["name"], f"{case['error']:.1e}", "–")
            continue
        both = case.get("with_quantisation")
        goals = [
            f"{'✓' if g['met'] else '✗'} {n} {g['reached']} of {g['asked']}" for n, g in case["goals"].items()
        ]
        shown.add_row(
            case["name"], f"{case['error']:.1e}", f"{min(case['us']):.1f}", f"{case['tflops']:.0f}",
            f"{case['gb_per_s']:.0f}", f"{case['share_of_limit']:.0%}", f"{both['share_of_limit']:.0%}" if both else "",
            "\n".join(f"{n} {p['times']:.2f}×" for n, p in case["peers"].items()), "\n".join(goals),
        )  # fmt: skip
    for one in results["layers"]:
        if "us" in one:
            rate, plain = (
                f"{one['tokens_per_s']:,.0f} tok/s",
                f"plain torch {one['plain_torch']['times']:.2f}×",
            )
            shown.add_row(
                one["name"], f"{one['error']:.1e}", f"{min(one['us']):.1f}", rate, "", "", "", plain, ""
            )
        else:
            shown.add_row(one["name"], f"{one['error']:.1e}", "–" if one["right"] else "WRONG")
    return shown


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where a kernel was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tune", action="store_true", help="find the fastest settings of this device and write them"
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on any machine; times nothing")
    parser.add_argument("--out", type=Path, help="the results file")
    chosen = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (chosen.rehearse and targets.interpreted()):
        print(
            "no CUDA device: nothing can be measured. `TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse` checks "
            "the kernels at tiny shapes; benchmarks/cpu.py measures this machine.",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(time.time_ns() % 2**32)  # fresh numbers in each run
    if chosen.tune:
        tune(device, chosen.rehearse)
    results = run(device, chosen.only, chosen.rehearse)
    console = Console(width=170)
    console.print(table(results))
    for case in results["cases"]:
        for name, reason in case["not_measured"].items():
            console.print(f"not measured: {name} at {case['name']}: {reason}", highlight=False)
    out = chosen.out
    if out is None and not (chosen.only or chosen.rehearse):
        out = RESULTS / f"gpu-{tuning.slug(results['machine']['gpu'])}-{results['machine']['date'][:10]}.json"
    if out is not None:
        write_json(out, results)
        if results["limits"]:
            from gpu_picture import draw

            draw(results, out.with_suffix(".svg"))
        print(f"written: {out}")
    return int(not all(one["right"] for one in results["cases"] + results["layers"]))


def tune(device: torch.device, small: bool) -> None:
    """Find settings and write them; a rehearsal writes nothing."""
    import gpu_tune

    generation = tuning.INTERPRETED if small else tuning.generation(device)
    budget_s = 0.0 if small else 45.0
    found = gpu_tune.tune(Stopwatch(device, budget_s=0.03), generation, budget_s, small)
    if small:
        return
    name = torch.cuda.get_device_name(device)
    versions = f"torch {torch.__version__}, triton {language.triton.__version__}"
    about = f"Measured on {name}, {versions}, {time.strftime('%Y-%m-%d')}."
    path = tuning.FOLDER / f"{tuning.slug(name)}.json"
    tuning.write(path, about, generation, found)
    tuning.sources.cache_clear()
    tuning.read.cache_clear()
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
