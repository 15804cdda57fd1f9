"""The small map that recurs in every lesson: the whole model in one row, the lesson's part lit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from dsv3lib.errors import CourseError
from dsv3lib.viz.diagram import Box, Diagram, diagram

PARTS = {
    "embedding": "the table that turns a token into a vector",
    "norm": "RMSNorm, before attention and before the experts",
    "attention": "multi-head latent attention",
    "latent": "the latent that keys and values are made of",
    "rope": "the dimensions that carry the position",
    "cache": "what is kept of every past token",
    "router": "the choice of experts, with its bias",
    "experts": "the routed experts",
    "shared": "the shared expert, for every token",
    "residual": "the stream that every layer adds to",
    "head": "from the stream to a probability for each token",
    "mtp": "the module that predicts one token further",
    "loss": "what training makes small",
    "precision": "the eight bits that every product of matrices is taken in",
    "pipeline": "which device works on which layer, and when",
}
"""Name → what it is. A lesson's row in the syllabus names those that it is about."""

_MIDDLE = 0.92
"""Height of the stream's arrow."""


def layer_map(lit: Sequence[str] = ()) -> tuple[Figure, str, str]:
    """Draw the way of a token through the model, with the parts that a lesson is about in colour.

    Args:
        lit: names from :data:`PARTS`; with none, the whole model is drawn in ink.

    Returns:
        The figure, its alt text and its caption.

    Raises:
        CourseError: a part is not on the map.
    """
    unknown = [name for name in lit if name not in PARTS]
    if unknown:
        raise CourseError(f"the map has no part {', '.join(map(repr, unknown))}; it has {', '.join(PARTS)}")
    d = diagram("Where this lesson is", width=9.6, height=1.95)
    _draw(d, set(lit))
    named = "; ".join(PARTS[name] for name in lit)
    alt = (
        "A row of boxes from left to right: embedding; a frame that stands for every layer and holds attention "
        "(latent, position, cache) and the mixture (router, experts, shared expert); head; loss. Below the head "
        f"hangs the module that predicts one token further. {f'In colour: {named}.' if lit else ''}"
    ).strip()
    caption = f"In colour, what this lesson is about: {named}." if lit else "The whole model, a token's way."
    return d.figure, alt, caption


def _draw(d: Diagram, lit: set[str]) -> None:
    def put(name: str, meaning: str, x: float, y: float, w: float, h: float = 0.4, words: str = "") -> Box:
        on = name in lit
        ink = meaning if on else None
        return d.box(x, y, words or name, meaning=ink, lit=on or not lit, w=w, h=h, kept=name == "cache")

    stream = "residual" in lit or not lit
    d.frame(1.55, 0.08, 5.65, 1.78, "one layer of 61: its two halves add to the stream", lit=True)
    d.frame(1.75, 0.25, 2.5, 1.27, "attention", meaning="content" if "attention" in lit else None)
    mixture = not lit.isdisjoint({"router", "experts", "shared"})
    d.frame(4.55, 0.25, 2.45, 1.27, "mixture of experts", meaning="forward" if mixture else None)
    embedding = put("embedding", "forward", 0.05, _MIDDLE - 0.27, 1.2, 0.54)
    put("latent", "latent", 1.9, 0.78, 0.98)
    put("rope", "rope", 3.08, 0.78, 0.98, words="position")
    put("cache", "latent", 1.98, 0.33, 0.82, 0.32)
    router = put("router", "bias", 4.7, 0.68, 0.85)
    experts = put("experts", "forward", 5.95, 0.78, 0.92, 0.36)
    put("shared", "forward", 5.95, 0.33, 0.92, 0.32)
    head = put("head", "forward", 7.5, _MIDDLE - 0.27, 0.8, 0.54)
    loss = put("loss", "backward-input", 8.65, _MIDDLE - 0.27, 0.8, 0.54)
    further = put("mtp", "forward", 7.32, 0.1, 1.16, 0.34, words="one further")
    d.arrow(embedding, (1.55, _MIDDLE), lit=stream)
    d.arrow((4.25, _MIDDLE), (4.55, _MIDDLE), lit=stream)
    d.arrow(router, experts, lit="router" in lit or not lit)
    d.arrow((7.2, _MIDDLE), head, lit=stream)
    d.arrow(head, loss, lit="loss" in lit or not lit)
    d.arrow(further, head, lit="mtp" in lit or not lit)
    if "precision" in lit:
        d.note(3.0, 0.49, "products in FP8", size=9, meaning="neutral")
        d.note(4.68, 0.49, "products in FP8", size=9, meaning="neutral")
    if "pipeline" in lit:
        d.note(8.62, 0.27, "over devices", size=8.5, meaning="communication")
    if "norm" in lit:
        d.note(3.0, 0.33, "norms", size=9, meaning="content")
