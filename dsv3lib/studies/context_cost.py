"""What a long context costs: attention of one layer at V3's head sizes, decode and prefill, counted and timed.

Decode reads the whole cache for every new token: linear in the context, and so are the cache's bytes. Prefill compares
every token with all before it: quadratic. What is counted holds anywhere; what is timed, for the machine it ran on.

    python -m dsv3lib.studies.context_cost

The log holds one line for each measurement. Decode is timed in the absorbed form up to 131,072 cached tokens (302 MB in
FP32); the expanded form would make 21 GB of keys and values there, so that it ends sooner. Prefill is timed as far as
patience reaches and counted to the end. ``load`` is the machine's load average before;
to measure anew, remove the file first.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import ModelConfig
from ..layers.attention import MultiHeadLatentAttention
from ..model.costs import attention_flops_per_cached_token, cache_bytes_per_token, forward_flops
from .log import FOLDER, record

Phase = Literal["decode", "prefill"]
CONTEXTS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
LONGEST_TIMED = {("decode", "absorbed"): 131_072, ("decode", "expanded"): 8_192, ("prefill", "expanded"): 4_096}
"""By phase and form, in tokens: what memory (expanded: 164 kB of keys and values a token) and time allow."""


def one_layer() -> ModelConfig:
    """V3's heads in a single layer."""
    return ModelConfig.preset("v3-671b").replace(
        num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0
    )


def counted(config: ModelConfig, phase: Phase, form: Literal["expanded", "absorbed"], context: int) -> int:
    """Operations of one layer's attention over a context, exact: scores, values, and the up-projections of this phase.

    Projections of the layer's input and output are left out: they do not depend on the context.

    Args:
        config: of one layer. phase: "decode", one new token, the last of ``context``; "prefill", all of them, each
            attending to itself and those before. form: of the attention.
            context: tokens.
    """
    heads, cached = config.num_attention_heads, attention_flops_per_cached_token(config, form)
    up = 2 * heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    if phase == "decode":
        return context * cached + (up if form == "absorbed" else 0)  # the query's W^UK and the mixture's W^UV
    pairs = context * (context + 1) // 2
    core = cached - (up if form == "expanded" else 0)  # of one query and one token, keys and values being made
    return context * up + pairs * core


def timed(
    config: ModelConfig, phase: Phase, form: str, context: int, repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """"seconds" and "processor_seconds" of the same, each the best of a few runs.

    The layer's input is made narrow, which saves memory; what is timed starts behind the queries' projection. With one
    thread on a CPU both are the same on a machine that does nothing else, and the second is hardly moved by what else
    runs there.

    Args:
        config: of one layer. phase, form, context: as in ``counted``. repeats: runs. device: where it is computed.
    """
    from ..course.stopwatch import milliseconds

    where, generator = torch.device(device), torch.Generator().manual_seed(0)
    layer = MultiHeadLatentAttention(config.replace(hidden_size=64, q_lora_rank=None), layer=0).to(where)
    new = 1 if phase == "decode" else context
    q = torch.randn(1, config.num_attention_heads, new, config.qk_head_dim, generator=generator).to(where)
    latents = torch.randn(1, context, config.latent_dim, generator=generator).to(where)
    spent: list[float] = []

    def attend() -> None:
        start = time.process_time()
        getattr(layer, form)(q, latents)
        spent.append(time.process_time() - start)

    wall = milliseconds(attend, where, repeats) / 1000
    return {"seconds": round(wall, 5), "processor_seconds": round(min(spent), 5)}


def run(phase: Phase, form: Literal["expanded", "absorbed"], context: int, repeats: int = 3) -> dict[str, Any]:
    """Count one setting, and time it where it is within reach."""
    config = one_layer()
    found: dict[str, Any] = {
        "flops": counted(config, phase, form, context),
        "layer_flops": context_free_flops(config) * (1 if phase == "decode" else context),
        "cache_bytes": context * cache_bytes_per_token(config, 4),
        "seconds": None,
    }
    if context <= LONGEST_TIMED.get((phase, form), 0):
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        found |= timed(config, phase, form, context, repeats) | {"load": load}
        found |= {"threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__}
    return found


def context_free_flops(config: ModelConfig) -> int:
    """Operations of one token in the layer's projections, the up-projections of keys and values left to ``counted``."""
    up = 2 * config.num_attention_heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    return forward_flops(config, 1)["attention"] // config.num_hidden_layers - up


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the log")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice when left out")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement; the best counts")
    asked = parser.parse_args(argv)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    settings = [{"phase": p, "form": f, "context": n} for p, f in LONGEST_TIMED for n in asked.contexts]
    record("context_cost", settings, partial(run, repeats=asked.repeats), asked.out)


if __name__ == "__main__":
    main()
