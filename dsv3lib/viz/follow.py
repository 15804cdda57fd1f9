"""Train and watch: the expert-load view moves under the cell that trains, and stays there as a picture."""

from __future__ import annotations

from typing import Any

from ..training.loop.comparison import Fresh, Outcome, compare
from ..training.loop.settings import TrainingConfig
from .expert_load import ExpertLoad


def train_and_watch(
    fresh: Fresh,
    config: TrainingConfig,
    way: str,
    title: str,
    caption: str = "",
    speed: float | None = None,
    alpha: float | None = None,
) -> tuple[Outcome, ExpertLoad]:
    """Train once in one way to balance, with the view of every expert's load drawn while it runs.

    Args:
        fresh: makes model and text, as ``compare`` takes it. config: what all runs share. way: how to balance.
        title: over the view. caption: under the picture that stays. speed: γ of "bias".
        alpha: α of "sequence" and "batch".
    """
    model, stream, _ = fresh()
    view = ExpertLoad.of_model(model.config, stream.domain_names, title=title)
    handle = _begin(view)

    def on_step(_way: str, record: dict[str, Any]) -> None:
        view.add(record)
        view.say(
            f"step {record['step']} of {config.steps}: loss {record['losses']['main']:.2f}, "
            f"MaxVio {max(record['max_violation']):.2f}"
        )

    outcome = compare(fresh, config, [way], speed=speed, alpha=alpha, on_step=on_step)[0]
    view.refresh(now=True)
    view.say("")
    if handle is not None:
        handle.update(view.bundle(caption), raw=True)
    return outcome, view


def _begin(view: ExpertLoad) -> Any:
    """Put the empty view under the cell; ``None`` where no front end shows anything."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    if not InteractiveShell.initialized():
        return None
    return display({**view.live_bundle(), "text/html": "", "text/plain": ""}, raw=True, display_id=True)
