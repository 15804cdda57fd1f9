"""The course inside its notebooks: set-up, predictions, exercises, progress.

How to write a notebook with it
===============================

A notebook is written as ``notebooks/source/NN_name.py`` (py:percent); ``make notebooks`` makes the
``.ipynb`` from it, executes it and keeps its outputs. Look at ``dsv3lib/course/notebooks.py`` for what
that does, and at ``tests/notebooks/lessons.py`` for the bounds that the tests hold each lesson to.

The text opens with jupytext's header (copy it from another lesson, or let
``python -m dsv3lib.course.notebooks --to-source NN`` write it), and its first two code cells are::

    # %% tags=["parameters"]
    STEPS = 60       # training steps
    SEED = 1234
    DEVICE = "auto"  # or "cpu", "cuda"
    FAST = False     # True: the same cells on less data, for the tests

    # %%
    from dsv3lib.course import setup
    session = setup(seed=SEED, notebook="01_mla_latent_cache", device=DEVICE)

``session.device`` and ``session.generator`` are what the cells after it use.

Each parameter stands on a line of its own: papermill reads no other form.

Predictions
-----------
``predict`` in a cell of its own, the cell that shows the answer after it, ``reveal`` at its end::

    predict("mla.p1", "How many KiB does V3 cache for one token?", number=(1, 10_000, "KiB"))
    predict("mla.p2", "What happens to the scores?", options=["they grow", "they stay", "they shrink"])

    reveal("mla.p1", 68.6, unit="KiB", because="61 layers × 576 values × 2 bytes.", close=0.1)
    reveal("mla.p2", "they stay", because="The products are reordered, nothing more.")
    reveal("mla.p3", 12.4, because="…", varies=True)      # a time: not compared by the tests

Exercises
---------
Defined in ``dsv3lib/course/exercises/<lesson>.py``: task, hints, solution (a real function), checker,
at least two plausible wrong answers. In the notebook, two cells::

    exercise("mla.1")

    def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
        ...                                   # the learner writes here

    check("mla.1", cache_bytes)

An empty body is shown as open, and *Run All* goes on. ``hint("mla.1")`` and ``solution("mla.1")`` exist
as functions too; under every check they are buttons. ``progress()`` shows all lessons.

What is compared
----------------
The notebook tests compare outputs word for word. So print integers, shapes and rounded values; hand what
differs between machines or runs (times, speeds, devices) to ``measured("…")`` and nowhere else, and give
``reveal`` a time with ``varies=True``. Pictures are not compared, their alt texts are; ``progress()`` is
not compared either.

Waiting
-------
Whatever takes longer than a few seconds gets a bar; it leaves nothing to compare::

    with bar("training", total=STEPS) as step:
        for batch in batches:
            step(note=f"loss {loss:.3f}")

At scale
--------
``at_scale("mla_decode sm_90", operations=("mla_decode",))`` compiles those kernels for Hopper on the spot, shows
what the code holds, and lists what ``benchmarks/gpu.py`` measured of them, or that nothing was measured.

Figures
-------
``dsv3lib.viz.style``: ``figure(title, xlabel, ylabel)``, ``line(meaning)``, ``bar(meaning)``,
``show(fig, alt=…)``. ``dsv3lib.viz.live.live(draw, tokens=[…])`` adds sliders to a static figure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3lib.course.answer import check, exercise, hint, solution
    from dsv3lib.course.card import measured
    from dsv3lib.course.overview import progress
    from dsv3lib.course.places import data_folder
    from dsv3lib.course.prediction import predict, reveal
    from dsv3lib.course.scale import at_scale
    from dsv3lib.course.session import Session, setup
    from dsv3lib.course.symbol_table import symbols
    from dsv3lib.course.tables import table
    from dsv3lib.course.waiting import bar

__all__ = [
    "Session",
    "at_scale",
    "bar",
    "check",
    "data_folder",
    "exercise",
    "hint",
    "measured",
    "predict",
    "progress",
    "reveal",
    "setup",
    "solution",
    "symbols",
    "table",
]

_HOME = {
    "Session": "session",
    "at_scale": "scale",
    "bar": "waiting",
    "check": "answer",
    "data_folder": "places",
    "exercise": "answer",
    "hint": "answer",
    "measured": "card",
    "predict": "prediction",
    "progress": "overview",
    "reveal": "prediction",
    "setup": "session",
    "solution": "answer",
    "symbols": "symbol_table",
    "table": "tables",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for, so that ``dsv3 lab`` starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # importing `symbols` has just put the module of that name here
    return value
