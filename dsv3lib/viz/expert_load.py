"""The load of every expert while a model learns: a picture, a widget that follows, a page without a kernel.

    view = ExpertLoad.of_model(config, stream.domain_names)   # empty
    view                                                       # last in a cell: the widget
    for record in trainer:
        view.add(record)                                       # it draws while the model trains

    ExpertLoad.of_run("runs/tiny")                             # a run that has been
    ExpertLoad.attach(model)                                   # anybody's mixture of experts, by hooks
    view.save_page("load.html")                                # one file, works in any browser, offline

Rows are mixture layers, columns experts; blue is idle, white the mean, red overloaded. Below: MaxVio and the
bias over time, who works for which text, what each node (a group of experts) has to do, and of a run over several
ranks what each of them computed beside the whole.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ..config import ModelConfig
from ..errors import InputError
from ..files import write_whole
from ..terminal import displayable
from . import style
from .load_history import CLIP, RECENT_STEPS, LoadHistory, relative
from .shades import fan

if TYPE_CHECKING:
    from torch import nn

    from .attach import Attachment

_SIZE = (9.6, 6.4)
_LEAST_PAUSE = 0.25
"""Seconds between two drawings of a live view …"""
_BYTES_PER_SECOND = 4_000_000
_SHARE_OF_TIME = 0.1
"""… and more where packets are large or slow to make, so that the view never holds the training up."""
_MOST_BIAS_LINES = 16


class ExpertLoad:
    """A view of a ``LoadHistory``.

    Args:
        history: what is shown; it may grow. title: above the view.
    """

    def __init__(self, history: LoadHistory, title: str = "Load of every expert") -> None:
        self.history, self.title = history, title
        self.attachment: Attachment | None = None
        self._widget: Any = None
        self._drawn, self._pause = 0.0, _LEAST_PAUSE

    @classmethod
    def of_model(cls, config: ModelConfig, domains: Sequence[str] = (), title: str = "") -> ExpertLoad:
        """An empty view for a model that is about to train."""
        return cls(LoadHistory.of_model(config, domains), title or "Load of every expert")

    @classmethod
    def of_run(cls, path: str | Path, title: str = "") -> ExpertLoad:
        """A run's view, from its folder or log.

        Raises:
            TrainingError: there is no log, or it is of another model than its header says.
        """
        return cls(LoadHistory.of_run(path), title or f"Load of every expert, {displayable(Path(path).name)}")

    @classmethod
    def attach(cls, model: nn.Module, title: str = "") -> ExpertLoad:
        """Watch a model's routing from now on, one frame a forward pass; see ``attach.py``.

        Raises:
            InputError: the model has no mixture layers that can be watched.
        """
        from .attach import Attachment

        attachment = Attachment(model)
        view = cls(attachment.history, title or f"Routing of {type(model).__name__}")
        view.attachment = attachment
        attachment.on_load = lambda: view.refresh() and None
        return view

    def detach(self) -> None:
        """Take an attached view's hooks off the model; what was seen stays."""
        if self.attachment is not None:
            self.attachment.detach()

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """While open, what an attached model routes is text of this domain."""
        if self.attachment is None:
            raise InputError("domain: this view is attached to no model; use ExpertLoad.attach(model)")
        with self.attachment.domain(name):
            yield

    # ---- growing -------------------------------------------------------------------------------------

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a training step's record, and draw if it is time.

        Raises:
            TrainingError: the record is of another model.
        """
        self.history.add(record)
        self.refresh()

    def refresh(self, now: bool = False) -> bool:
        """Hand what is new to the widget, at most a few times a second; ``now`` does not wait.

        Returns:
            Whether it was handed over.
        """
        if self._widget is None or (not now and time.monotonic() - self._drawn < self._pause):
            return False
        started = time.monotonic()
        packet = self.history.packet(self.title)
        self._widget.packet = packet
        self._drawn = time.monotonic()
        taken = self._drawn - started
        self._pause = max(_LEAST_PAUSE, len(packet) / _BYTES_PER_SECOND, taken / _SHARE_OF_TIME)
        return True

    def say(self, state: str) -> None:
        """Put a line above the view: what the run is doing."""
        if self._widget is not None:
            self._widget.state = state

    # ---- forms -----------------------------------------------------------------------------------------

    def widget(self) -> Any:
        """The view as a widget, the same one at every call."""
        if self._widget is None:
            self._widget = _widget_class()(packet=self.history.packet(self.title))
            self._drawn = time.monotonic()
        return self._widget

    def page(self) -> str:
        """The view as one HTML page that needs no kernel, no server and no network."""
        script = (files("dsv3lib.viz") / "expert_load.js").read_text(encoding="utf-8")
        _, alt = self.figure() if len(self.history) else (None, "No step has been recorded yet.")
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title></head><body style='margin:0;background:{style.PAPER}'>"
            f'<main id="view" aria-label="{html.escape(alt, quote=True)}"></main>'
            f'<noscript>{html.escape(alt)}</noscript><script type="module">\n{script}\n'
            f'const text = "{self.history.packet_text(self.title)}";\n'
            'mount(document.getElementById("view"), Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));\n'
            "</script></body></html>\n"
        )

    def save_page(self, path: str | Path) -> Path:
        """Write ``page()``; the file is there whole or not at all.

        Raises:
            SaveError: it cannot be written.
        """
        path = Path(path)
        write_whole(path, self.page())
        return path

    def figure(
        self, step: int | None = None, layer: int = 0, domain: str | None = None, rank: int | None = None
    ) -> tuple[Figure, str]:
        """The view as a still picture, and its alt text.

        Args:
            step: a step's number, by default the last. layer: row of the lower panels.
            domain: text whose load the heat map shows, by default all.
            rank: whose load the heat map shows, by default all; of a domain it is not known by rank.

        Raises:
            InputError: there is no such step, layer, domain or rank.
        """
        history = self.history
        at = self._place(step)
        if not 0 <= layer < len(history.layers):
            raise InputError(f"layer: {layer}, expected a row from 0 to {len(history.layers) - 1}")
        if domain is not None and domain not in history.domains:
            raise InputError(f"domain: {domain!r}, expected one of {', '.join(history.domains) or 'none'}")
        if rank is not None and (domain is not None or not 0 <= rank < history.ranks):
            raise InputError(f"rank: {rank}, expected one of {history.ranks} ranks, numbered from 0, and no domain")
        load = history.load[at] if domain is None else history.by_domain[at, history.domains.index(domain)]
        whose = domain or "all text"
        if rank is not None:
            load, whose = history.by_rank[at, rank], f"rank {rank}"
        rows = 3 if history.ranks else 2
        fig, axes = style.figure(
            f"{self.title} · step {history.steps[at]} · {whose}", None, None,
            rows=rows, columns=2, size=(_SIZE[0], _SIZE[1] * rows / 2),
        )  # fmt: skip
        heat_map(axes[0, 0], relative(load), history.layers, history.groups)
        axes[0, 0].set_title("load relative to the mean", fontsize=11, fontweight="normal")
        self._violations(axes[0, 1], layer, history.steps[at])
        moved = any(history.speeds)  # a bias that stands still needs no chart
        (self._biases if moved else self._nodes)(axes[1, 0], layer, at)
        self._domains(axes[1, 1], layer, at)
        if history.ranks:
            axes[2, 1].remove()
            axes[2, 0].set_subplotspec(axes[2, 0].get_gridspec()[2, :])
            self._ranks(axes[2, 0], layer, at)
        alt = (
            f"{'Five' if history.ranks else 'Four'} panels. A heat map of {len(history.layers)} layers by "
            f"{history.experts} experts, blue where an expert is idle and red where it is overloaded; MaxVio over "
            f"the steps; {'the bias of each expert over the steps' if moved else 'the visits to each node'}; and "
            f"{'the load by text domain' if history.domains else 'the visits to each node'}"
            + (f"; and the load of all {history.ranks} ranks beside each rank's." if history.ranks else ".")
        )
        return fig, alt

    def _place(self, step: int | None) -> int:
        steps = self.history.steps
        if not steps:
            raise InputError("step: nothing has been recorded yet; add a record first")
        if step is None:
            return len(steps) - 1
        if step not in steps:
            raise InputError(f"step: {step}, expected one from {steps[0]} to {steps[-1]}")
        return steps.index(step)

    def _violations(self, ax: Any, layer: int, step: int) -> None:
        history = self.history
        plain = {"marker": ""}
        ax.plot(
            history.steps, history.violation.mean(1), **style.line("neutral") | plain, label="mean of layers"
        )
        ax.plot(
            history.steps, history.violation[:, layer], **style.line("content") | plain,
            label=history.layers[layer],
        )  # fmt: skip
        ax.axvline(step, color=style.INK, linewidth=0.8)
        top = 1.25 * max(float(history.violation.max()), 0.1)  # room for the legend
        ax.set(xlabel="training step", ylabel="MaxVio (max / mean − 1)", ylim=(0, top))
        ax.legend(loc="upper center", ncols=2)

    def _biases(self, ax: Any, layer: int, _at: int) -> None:
        history = self.history
        final = history.bias[-1, layer]
        order = np.argsort(final)
        if len(order) > _MOST_BIAS_LINES:
            half = _MOST_BIAS_LINES // 2
            order = np.concatenate([order[:half], order[-half:]])
        fan(
            ax, history.steps, [history.bias[:, layer, e].tolist() for e in order], [str(e) for e in order],
            "bias",
        )  # fmt: skip
        ax.set(xlabel="training step", ylabel="bias (added to the affinity)")
        ax.set_title(
            f"bias of {len(order)} experts, {history.layers[layer]}", fontsize=11, fontweight="normal"
        )

    def _domains(self, ax: Any, layer: int, at: int) -> None:
        history = self.history
        if history.domains:
            recent = _recent(history.by_domain, at)[:, layer]
            heat_map(ax, relative(recent), history.domains, history.groups)
            ax.set_title(
                f"by text, {history.layers[layer]}, last {RECENT_STEPS} steps",
                fontsize=11,
                fontweight="normal",
            )
            return
        self._nodes(ax, layer, at)

    def _ranks(self, ax: Any, layer: int, at: int) -> None:
        """All ranks' load of one layer, and below it what each rank computed of it."""
        history = self.history
        rows = [_recent(history.load, at)[layer], *_recent(history.by_rank, at)[:, layer]]
        heat_map(ax, relative(np.stack(rows)), rank_names(history.ranks), history.groups)
        words = f"by rank, {history.layers[layer]}, last {RECENT_STEPS} steps"
        ax.set_title(words, fontsize=11, fontweight="normal")

    def _nodes(self, ax: Any, layer: int, at: int) -> None:
        history = self.history
        nodes = relative(history.load[at, layer].reshape(history.groups, -1).sum(-1))
        ax.bar(range(history.groups), nodes, **style.bar("communication"))
        ax.axhline(1.0, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_xticks(range(history.groups))
        ax.set(xlabel="node (one group of experts)", ylabel="visits relative to the mean")

    def live_bundle(self) -> dict[str, Any]:
        """The widget alone, as Jupyter's data."""
        view = self.widget()._repr_mimebundle_()
        view = view[0] if isinstance(view, tuple) else view
        return {n: value for n, value in (view or {}).items() if n.startswith("application/vnd.jupyter")}

    def bundle(self, caption: str = "") -> dict[str, Any]:
        """The still picture for a page without a kernel, the widget where there is one.

        Args:
            caption: the sentence under the still picture.
        """
        if not len(self.history):
            return {"text/plain": f"{self.title}: nothing to see yet", **self.live_bundle()}
        return {**style.bundle(*self.figure(), caption), **self.live_bundle()}

    def _repr_mimebundle_(self, **_options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.bundle(), {}


def rank_names(ranks: int) -> list[str]:
    """What the rows of a comparison of ranks are called."""
    return ["all ranks", *(f"rank {rank}" for rank in range(ranks))]


def _recent(loads: np.ndarray, at: int) -> np.ndarray:
    """The sum of the latest steps, up to one."""
    return loads[max(0, at + 1 - RECENT_STEPS) : at + 1].sum(0)


def heat_map(ax: Any, ratios: np.ndarray, names: Sequence[str], groups: int = 1) -> None:
    """Draw loads relative to their mean, [rows, experts], on a log scale around 1; lines part the groups."""
    floor = 2.0**-CLIP
    silent = ratios.sum(-1) == 0  # no token came: not idle experts, but nothing to be said
    shown = np.where(silent[:, None], np.nan, np.log2(np.clip(ratios, floor, 1 / floor)))
    image = ax.imshow(
        shown, cmap=style.DIVERGING, vmin=-CLIP, vmax=CLIP, aspect="auto", interpolation="nearest"
    )
    rows, experts = ratios.shape
    for row in np.flatnonzero(silent):
        ax.text(experts / 2 - 0.5, row, "no tokens", ha="center", va="center", fontsize=9)
    every = -(-rows // 16)
    ax.set_yticks(range(0, rows, every), [names[i] for i in range(0, rows, every)])
    ax.set_xticks(range(0, experts, -(-experts // 8)))
    ax.grid(False)
    for group in range(1, groups):
        ax.axvline(group * experts / groups - 0.5, color=style.INK, linewidth=0.8)
    ax.set_xlabel("expert (lines part the groups)" if groups > 1 else "expert")
    bar = ax.figure.colorbar(image, ax=ax, ticks=[-CLIP, 0, CLIP], fraction=0.05)
    bar.ax.set_yticklabels([f"≤ {floor:g}×", "mean", f"≥ {1 / floor:g}×"])
    bar.outline.set_visible(False)


def _widget_class() -> type:
    """The widget's class; anywidget comes with the ``lab`` extra and is wanted only here."""
    import anywidget
    import traitlets

    class ExpertLoadWidget(anywidget.AnyWidget):
        """Draws packets in the browser; sliders need no kernel."""

        _esm = (files("dsv3lib.viz") / "expert_load.js").read_text(encoding="utf-8")
        packet = traitlets.Bytes(b"").tag(sync=True)
        state = traitlets.Unicode("").tag(sync=True)

    return ExpertLoadWidget
