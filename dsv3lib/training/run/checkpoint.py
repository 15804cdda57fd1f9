"""``make checkpoint``: trains tiny-v3, then its dense twin on the same tokens, measures both, writes the folder; last
the MTP modules learn to draft for the finished model.

Each stage is passed over where it is done already, and a stage that was stopped goes on from its last save point:
the same command again is all there is to know.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from ...errors import TrainingError
from . import drafts
from . import folder as run_folder
from .first_steps import record_first_steps
from .interrupt import exit_code
from .log import read_log
from .publish import publish
from .tiny_v3 import DEFAULT_TOKENS, PRESET, settings, train

OUT = Path("data") / "checkpoints" / PRESET
FIRST_STEPS = Path("tests") / "training" / "run" / "tiny_v3_first_steps.json"
DEFAULT_THREADS = 1
"""Of these small matrices a second thread does little; with one the two runs can be started side by side."""


def make(
    runs: Path,
    out: Path,
    threads: int = DEFAULT_THREADS,
    minutes: float | int | None = None,
    first_steps: Path | None = None,
) -> bool:
    """All stages in their order.

    Args:
        runs: folder of the three runs. out: the checkpoint's folder; one that is there is replaced at the very end.
        threads: torch's. minutes: length of the main run by the clock; by default it reads ``DEFAULT_TOKENS``. The
            twin reads the same tokens.
        first_steps: file to write for the test that runs the first steps again.

    Returns:
        True when all is done, False when it was interrupted.

    Raises:
        Dsv3Error: a run or the folder cannot be written, or training failed.
    """
    main, twin = runs / PRESET, runs / f"{PRESET}-dense"
    if not _is_finished(main) and not train(
        main, None if main.exists() else settings(minutes, threads=threads)
    ):
        return False
    tokens = read_log(main).steps[-1]["tokens"]
    described = run_folder.read_run(main)
    config = settings(
        tokens=tokens, threads=described["training"]["threads"], decay_after=described["decided_after"]
    )
    if not _is_finished(twin) and not train(twin, None if twin.exists() else config, dense=True):
        return False
    fresh = out.with_name(f".new-{out.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    record = publish(main, fresh, twin)
    distilled = runs / f"{PRESET}-drafts"
    new = None if (distilled / drafts.RUN).exists() else drafts.settings(threads=threads)
    if not drafts.distil(fresh, distilled, fresh, new):
        return False
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)
    if first_steps is not None:
        record_first_steps(main, first_steps)
    row = record["bits_per_byte"]["all"]
    print(
        f"{out}: {row['model']:.3f} bits per byte; 5-gram {row['five_gram']:.3f}, dense twin {row['dense']:.3f}"
    )
    return True


def _is_finished(run: Path) -> bool:
    try:
        end = read_log(run).end if run.exists() else None
    except TrainingError:
        return False
    return end is not None and end["reason"] == "finished"


def main(arguments: list[str] | None = None) -> int:
    """Train, measure and write tiny-v3; the command line of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3lib.training.run.checkpoint", description=main.__doc__
    )
    parser.add_argument(
        "--minutes", type=float, help=f"length of the main run by the clock (else {DEFAULT_TOKENS:,} tokens)"
    )
    parser.add_argument("--threads", type=int, default=DEFAULT_THREADS, help="torch's threads (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="the checkpoint's folder (%(default)s)")
    options = parser.parse_args(arguments)
    return exit_code(
        lambda: make(options.runs, options.out, options.threads, options.minutes, FIRST_STEPS)
    )


if __name__ == "__main__":
    sys.exit(main())
