"""The course inside its notebooks: set-up, predictions, exercises, tables, progress.

How to write a lesson with it
=============================

A lesson is written as ``notebooks/source/NN_name.py`` (py:percent); ``make notebooks`` makes the ``.ipynb`` from it,
executes it and keeps its outputs. What a reader of the page sees is that; a learner gets a copy of their own
(``dsv3 lab``, ``dsv3lib.course.workspace``). Its row is in ``syllabus.py``, its exercises in ``exercises/<short>.py``;
both are found by name. ``notebooks/source/00_start_here.py`` is the pattern.

The text opens with jupytext's header (``python -m dsv3lib.course.notebooks --to-source NN`` writes it), the title with
three claims in bold and without numbers, and two code cells::

    # %% tags=["parameters"]
    STEPS = 60       # training steps
    SEED = 1234
    DEVICE = "auto"  # or "cpu", "cuda"
    FAST = False     # True: the same cells on less data, for the tests

    # %%
    from dsv3lib.course import setup
    session = setup(seed=SEED, notebook="01_mla_latent_cache", device=DEVICE)

``session.device`` and ``session.generator`` are what the cells after it use. ``setup`` also draws the small map of the
model with the lesson's part lit. Each parameter stands on a line of its own: papermill reads no other form.

Predictions
-----------
``predict`` in a cell of its own, the cell that shows the answer after it, ``reveal`` at its end::

    predict("mla.p1", "How many KiB does V3 cache for one token?", number=(1, 10_000, "KiB"))
    predict("mla.p2", "What happens to the scores?", options=["they grow", "they stay", "they shrink"])

    reveal("mla.p1", 68.6, unit="KiB", because="61 layers × 576 values × 2 bytes.", close=0.1)
    reveal("mla.p3", 12.4, because="…", varies=True)      # a time: not compared by the tests

Where no prediction was made, all that the cell of ``reveal`` shows is folded (``folding.py``). A further cell that
gives the answer away begins with ``# answers mla.p1``. What must be seen while it runs (a bar, a live view)
belongs into the cell before.

The learner writes the idea
---------------------------
An exercise stands where the mechanism is built, in two cells::

    exercise("mla.1")                         # the task: specification, picture, minutes

    def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
        ...                                   # the learner writes here


    cache_bytes = check("mla.1", cache_bytes)

``check`` returns what the later cells use: the learner's function once it is right, the reference until then, so *Run
All* never stops. Once right, the reference opens beside it; before, it is folded on the page and behind "Skip" in the
notebook. The reference is the exercise's ``solution``: no cell repeats it. An exercise has at least five natural ways
to be right (``also_right``) and five to be wrong, each of which the check names (``WrongAnswer.says``).
``hint("mla.1")`` and ``solution("mla.1")`` exist as functions too. ``progress()`` shows all lessons.

Claims
------
Each claim in bold, and each paragraph that states a number without its source, names the cell that asserts it:
``<!-- claim: latent -->`` after it, and ``# %% tags=["claim:latent"]`` on a cell with an ``assert`` (``claims.py``).
``tests/notebooks/claims/<short>.py`` says how each bold claim's mechanism is switched off, and a test sees its cell
fail then.

Tables and symbols
------------------
``symbols("d", "d_c", ("c_t^{KV}", "latent", "[d_c]", "what is cached of a token"))`` shows the paper's letter, the
code's name, the shape, and both presets' numbers, computed. ``table(head, rows, caption=…, varies=…)`` shows anything
else.

Figures
-------
A figure is one call into ``dsv3lib.viz``, whose functions return (figure, alt text, caption): ``style.show(*figure)``.
The caption is for eyes, the alt text for readers who do not see. ``dsv3lib.viz.diagram`` draws data flow with real
numbers, ``dsv3lib.viz.live.live(draw, tokens=[…])`` adds sliders.

What is compared
----------------
The notebook tests compare outputs word for word. So print integers, shapes and rounded values; hand what
differs between machines or runs (times, speeds, devices) to ``measured("…")`` or to ``table(…, varies=True)``, and give
``reveal`` a time with ``varies=True``. Pictures are not compared, their alt texts are; ``progress()`` is
not compared either. A lesson reads recorded runs through ``data_folder()``: a learner's copy lies elsewhere.

Waiting
-------
Whatever takes longer than a few seconds gets a bar; it leaves nothing to compare::

    with bar("training", total=STEPS) as step:
        for batch in batches:
            step(note=f"loss {loss:.3f}")

At scale
--------
``at_scale("mla_decode sm_90", operations=("mla_decode",))``, in a cell tagged ``folded``, compiles those kernels for
Hopper on the spot, shows what the code holds, and lists what ``benchmarks/gpu.py`` measured of them, or that nothing
was measured. A folded cell counts nothing towards the lesson's minutes (``python -m dsv3lib.course.minutes NN``).
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
