"""One token in one mixture layer, drawn with its real numbers: affinities, the chosen experts, their gates, the sum."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from dsv3lib.errors import CourseError
from dsv3lib.viz.diagram import diagram

_CELL = 0.46
_LEFT = 1.75


def token_route(
    affinities: Sequence[float], chosen: Sequence[int], gates: Sequence[float], width: int
) -> tuple[Figure, str, str]:
    """Draw how one token is sent to experts.

    Args:
        affinities: s, one a routed expert, between 0 and 1; at most 16 fit.
        chosen: the experts that are chosen, best first. gates: how much each counts, in the same order.
        width: of the token's vector.

    Returns:
        The figure, its alt text and its caption.

    Raises:
        CourseError: there are too many experts for the page, or a gate is missing.
    """
    if not 1 <= len(affinities) <= 16 or len(chosen) != len(gates):
        raise CourseError(
            f"{len(affinities)} affinities, {len(chosen)} chosen and {len(gates)} gates; expected at most 16 "
            "affinities, and a gate for each chosen expert"
        )
    d = diagram("One token, sent to a few experts", width=9.4, height=3.1)
    token = d.box(0.1, 2.15, "token", f"[{width}]", w=1.0, h=0.6)
    d.note(_LEFT, 2.78, f"affinity to each of the {len(affinities)} routed experts", size=9)
    strip = d.numbers(
        _LEFT, 2.3, list(affinities), meaning="bias", lit=[i in chosen for i in range(len(affinities))]
    )
    for number in range(len(affinities)):
        d.note(_LEFT + (number + 0.5) * _CELL, 2.18, str(number), size=7, centred=True)
    d.arrow(token, strip, "router", at=(1.43, 2.62))
    step = 7.4 / max(len(chosen), 1)
    total = d.box(4.0, 0.05, "sum", f"[{width}]", w=1.0, h=0.5)
    for place, (expert, gate) in enumerate(sorted(zip(chosen, gates, strict=True))):
        box = d.box(
            _LEFT + place * step, 1.05, f"expert {expert}", f"× {gate:.2f}", meaning="forward", w=1.25, h=0.6
        )
        d.arrow((_LEFT + (expert + 0.5) * _CELL, 2.1), box)
        d.arrow(box, total)
    shared = d.box(0.1, 1.05, "shared", "always", meaning="forward", w=1.0, h=0.6)
    d.arrow(token, shared)
    d.arrow(shared, total)
    names = ", ".join(str(expert) for expert in sorted(chosen))
    return d.done(
        alt=f"A token's vector goes to a router, which gives {len(affinities)} numbers; {len(chosen)} of them are in "
        f"colour, those of experts {names}, and arrows lead from them to those experts. The shared expert gets the "
        "token without being chosen. All results are added.",
        caption="Only the experts in colour work for this token. Each result is multiplied by its gate and added.",
    )
