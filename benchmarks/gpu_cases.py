"""What is measured on a GPU: each kernel at V3's shapes, with its reference, its peers, its bytes and operations.

A case is prepared when its turn comes and dropped after it, so that a card of 80 GB suffices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from gpu_attention import decode, prefill
from gpu_elementwise import gate, norm, permute, rope, swiglu
from gpu_products import fused, gemm, grouped, quantize, quantize_both
from gpu_work import (
    Case,
    Work,
)  # fmt: skip


def cases(small: bool = False) -> Iterator[Case]:
    """All cases; ``small`` is a rehearsal, for a machine without a GPU."""
    for operation, prepare, shapes, rehearsal in TABLE:
        for shape in [rehearsal] if small else shapes:
            yield Case(operation, shape, prepare)


TABLE: list[tuple[str, Callable[..., Work], list[dict[str, int]], dict[str, int]]] = [
    ("quantize_tiles", quantize, [{"M": 32768, "K": 4096}, {"M": 32768, "K": 7168}], {"M": 5, "K": 256}),
    ("quantize_tiles_both", quantize_both, [{"M": 32768, "K": 7168}], {"M": 128, "K": 256}),
    ("rms_norm_quantize", partial(fused, norm=1), [{"M": 32768, "D": 7168}], {"M": 5, "D": 256}),
    ("swiglu_quantize", partial(fused, norm=0), [{"M": 32768, "D": 2048}], {"M": 5, "D": 256}),
    (
        "gemm_fp8",
        gemm,
        [
            {"M": m, "N": n, "K": d}
            for m, n, d in [
                (4096, 24576, 7168),
                (4096, 32768, 512),
                (4096, 7168, 16384),
                (4096, 4096, 7168),
                (1024, 8192, 8192),
                (64, 24576, 7168),
                (128, 24576, 7168),
                (128, 7168, 16384),
            ]
        ],
        {"M": 33, "N": 256, "K": 256},
    ),
    (
        "grouped_gemm_fp8",
        grouped,
        [{"G": 8, "M": 4096, "N": 4096, "K": 7168}, {"G": 8, "M": 4096, "N": 7168, "K": 2048}],
        {"G": 3, "M": 20, "N": 128, "K": 128},
    ),
    (
        "grouped_gemm",
        partial(grouped, fp8=0),
        [{"G": 8, "M": 4096, "N": 4096, "K": 7168}, {"G": 8, "M": 4096, "N": 7168, "K": 2048}],
        {"G": 3, "M": 20, "N": 48, "K": 40},
    ),
    (
        "mla_decode",
        decode,
        [
            {"B": 128, "S": 8192, "H": 128},
            {"B": 128, "S": 8192, "H": 16},
            {"B": 64, "S": 4096, "H": 128, "q": 2},
        ],
        {"B": 2, "S": 70, "H": 16, "C": 128, "R": 16},
    ),
    (
        "mla_decode fp8",
        partial(decode, fp8=1),
        [{"B": 128, "S": 8192, "H": 128}, {"B": 128, "S": 8192, "H": 16}],
        {"B": 2, "S": 70, "H": 16, "C": 128, "R": 16},
    ),
    (
        "mla_prefill",
        prefill,
        [{"B": 2, "T": 4096, "H": 128}],
        {"B": 2, "T": 33, "H": 2, "N": 16, "R": 16, "V": 16},
    ),
    (
        "mla_prefill backward",
        partial(prefill, back=1),
        [{"B": 2, "T": 4096, "H": 128}],
        {"B": 1, "T": 33, "H": 2, "N": 16, "R": 16, "V": 16},
    ),
    (
        "gate",
        gate,
        [{"T": t, "E": 256, "K": 8, "groups": 8, "kept": 4} for t in (4096, 32768)],
        {"T": 9, "E": 32, "K": 4, "groups": 4, "kept": 2},
    ),
    ("permute", permute, [{"T": 8192, "D": 7168, "E": 256, "K": 8}], {"T": 9, "D": 64, "E": 8, "K": 2}),
    ("rms_norm", norm, [{"M": 32768, "D": 7168}], {"M": 5, "D": 96}),
    ("rope", rope, [{"T": 8192, "H": 128}], {"T": 5, "H": 2, "N": 16, "R": 8}),
    ("swiglu", swiglu, [{"M": 32768, "D": 2048}], {"M": 5, "D": 96}),
]
