"""The load of every expert at every step, as a view needs it: collected from records, thinned, and packed.

A history grows by the step records of a run (from the trainer at hand, or from another process's log) or by
loads that hooks counted. It keeps every step; what is sent to a page is thinned: neighbouring steps are
*summed* to frames, so no token is lost, only resolution in time.

The bias is in no record, and need not be: its rule is b ← b + γ·sign(mean − load), so γ and the loads give
it back to the bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..config import ModelConfig
from ..errors import InputError, TrainingError
from ..training.run import log as runlog
from . import style

MAX_FRAMES = 500
MAX_BYTES = 24_000_000
"""Of loads in one packet; 500 steps of V3's 58 layers x 256 experts are 15 MB."""
_BIAS_FRAMES = 64
_COLOURS = 256
RECENT_STEPS = 10
"""The comparison of domains and of ranks sums so many steps: one batch holds few rows of each, of some none."""
CLIP = 2.0
"""The heat map's ends: 2**-CLIP and 2**CLIP times the mean."""


class LoadHistory:
    """Loads by step, layer and expert; by text domain, and by the ranks of a run of several, where that is known.

    Args:
        layers: names of the mixture layers. experts: in each. groups: the experts' groups (nodes).
        domains: names of the text domains, if loads are known by domain.
        numbers: of the layers in the model, by which a log tells a rank's loads; by default 0, 1 and so on.
    """

    def __init__(
        self,
        layers: Sequence[str],
        experts: int,
        groups: int = 1,
        domains: Sequence[str] = (),
        numbers: Sequence[int] = (),
    ) -> None:
        if not layers or experts < 1 or groups < 1 or experts % groups:
            raise InputError(
                f"layers, experts, groups: {len(layers)}, {experts}, {groups}; expected at least one layer and "
                "groups that divide the experts"
            )
        self.layers, self.experts, self.groups = list(layers), experts, groups
        self.domains = list(domains)
        self._rows = {str(number): row for row, number in enumerate(numbers or range(len(layers)))}
        self.clear()

    @classmethod
    def of_model(cls, config: ModelConfig, domains: Sequence[str] = ()) -> LoadHistory:
        """An empty history for one of our models; its rows are ``config.moe_layers``."""
        names = [
            f"layer {i}" if i < config.num_hidden_layers else f"MTP {i - config.num_hidden_layers + 1}"
            for i in config.moe_layers
        ]
        return cls(names, config.n_routed_experts, config.n_group, domains, list(config.moe_layers))

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> LoadHistory:
        """An empty history for the run that a log's header describes.

        Raises:
            TrainingError: the header describes no mixture model.
        """
        try:
            return cls.of_model(ModelConfig.from_dict(header["model"]), header.get("domains", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"header: describes no mixture of experts that can be shown ({error})"
            ) from error

    @classmethod
    def of_run(cls, path: str | Path) -> LoadHistory:
        """The history of a run's folder or log, as far as it has come.

        Raises:
            TrainingError: there is no log, or its steps are of another model than its header.
        """
        log = runlog.read_log(path)
        history = cls.of_header(log.header)
        for record in log.steps:
            history.add(record)
        return history

    def clear(self) -> None:
        """Forget all steps."""
        self.steps: list[int] = []
        self.speeds: list[float] = []
        self.losses: list[float | None] = []
        self._load: list[np.ndarray] = []
        self._by_domain: list[np.ndarray] = []
        self.ranks = 0
        self._by_rank: list[np.ndarray] = []  # of a step its own number of ranks: a run may go on with others
        self._violation: list[np.ndarray] = []
        self._bias = np.zeros((len(self.layers), self.experts), np.float32)
        self._biases: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.steps)

    # ---- growing -------------------------------------------------------------------------------------

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a step's record, as the trainer gives it and its log has it.

        Raises:
            TrainingError: the record is of another model or other domains, or of a step that is already here.
        """
        step = int(record["step"])
        load = self._fitting("expert_load", record["expert_load"], (), step)
        known = record.get("domain_load") or {}
        if set(known) - set(self.domains):
            raise TrainingError(
                f"step {step}: domain_load has {', '.join(known)}, expected {', '.join(self.domains) or 'none'}; "
                "the log is of a run on other text"
            )
        if self.steps and step <= self.steps[-1]:
            raise TrainingError(f"step {step}: comes after step {self.steps[-1]}; clear the history first")
        nothing = np.zeros_like(load)
        by_domain = [
            self._fitting(f"domain_load.{d}", known[d], (), step) if d in known else nothing
            for d in self.domains
        ]
        by_rank = [self._of_rank(rank, of_rank, step) for rank, of_rank in enumerate(record.get("rank_load") or ())]
        self._append(step, load, by_domain, float(record.get("bias_speed", 0.0)), record.get("losses"), by_rank)

    def add_load(self, load: np.ndarray, domain: str | None = None) -> None:
        """Take in one forward pass's load [layers, experts], all of one domain's text where that is said."""
        if domain is not None and domain not in self.domains:
            self.domains.append(domain)
            more = np.zeros((1, len(self.layers), self.experts), np.int64)
            self._by_domain = [np.concatenate([known, more]) for known in self._by_domain]
        step = self.steps[-1] + 1 if self.steps else 1
        load = self._fitting("load", load, (), step)
        by_domain = [load if d == domain else np.zeros_like(load) for d in self.domains]
        self._append(step, load, by_domain, 0.0, None)

    def _append(
        self,
        step: int,
        load: np.ndarray,
        by_domain: list[np.ndarray],
        speed: float,
        losses: Any,
        by_rank: Sequence[np.ndarray] = (),
    ) -> None:
        self.steps.append(step)
        self._load.append(load)
        self._violation.append(relative(load).max(-1) - 1.0)
        self._by_domain.append(np.stack(by_domain) if by_domain else np.zeros((0, *load.shape), np.int64))
        self._by_rank.append(np.stack(by_rank) if by_rank else np.zeros((0, *load.shape), np.int64))
        self.ranks = max(self.ranks, len(by_rank))
        self.speeds.append(speed)
        self.losses.append(None if not losses else losses.get("main"))
        total = load.sum(-1, keepdims=True)
        self._bias = self._bias + np.float32(speed) * np.sign(total - load * self.experts).astype(np.float32)
        self._biases.append(self._bias)

    def _of_rank(self, rank: int, by_layer: Mapping[str, Any], step: int) -> np.ndarray:
        """What a rank computed, in this history's rows; a layer that it does not hold has zeros."""
        unknown = by_layer.keys() - self._rows.keys()
        if unknown:
            raise TrainingError(
                f"step {step}: rank_load of rank {rank} has layer {min(unknown)}, expected one of "
                f"{', '.join(self._rows)}; the log is of another model"
            )
        rows: list[Any] = [[0] * self.experts for _ in self.layers]
        for number, load in by_layer.items():
            rows[self._rows[number]] = load
        return self._fitting(f"rank_load of rank {rank}", rows, (), step)

    def _fitting(self, name: str, value: Any, lead: tuple[int, ...], step: int) -> np.ndarray:
        expected = (*lead, len(self.layers), self.experts)
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty(0)
        if array.shape != expected or array.dtype.kind not in "iu":
            raise TrainingError(
                f"step {step}: {name} has shape {array.shape} of {array.dtype}, expected whole numbers of shape "
                f"{expected} ({len(self.layers)} mixture layers x {self.experts} experts); the log is of "
                "another model"
            )
        return array

    # ---- what a view asks ------------------------------------------------------------------------------

    @property
    def load(self) -> np.ndarray:
        """Int64 [steps, layers, experts]."""
        shape = (0, len(self.layers), self.experts)
        return np.stack(self._load) if self._load else np.zeros(shape, np.int64)

    @property
    def by_domain(self) -> np.ndarray:
        """Int64 [steps, domains, layers, experts]."""
        shape = (0, len(self.domains), len(self.layers), self.experts)
        return np.stack(self._by_domain) if self._by_domain else np.zeros(shape, np.int64)

    @property
    def by_rank(self) -> np.ndarray:
        """Int64 [steps, ranks, layers, experts], zeros for ranks that a step did not have."""
        found = np.zeros((len(self), self.ranks, len(self.layers), self.experts), np.int64)
        for at, of_step in enumerate(self._by_rank):
            found[at, : len(of_step)] = of_step
        return found

    @property
    def bias(self) -> np.ndarray:
        """FP32 [steps, layers, experts], the routers' bias after each step, replayed from γ and the loads."""
        shape = (0, len(self.layers), self.experts)
        return np.stack(self._biases) if self._biases else np.zeros(shape, np.float32)

    @property
    def violation(self) -> np.ndarray:
        """MaxVio, [steps, layers]."""
        return np.stack(self._violation) if len(self) else np.zeros((0, len(self.layers)))

    def packet(self, title: str = "") -> bytes:
        """All that a page needs to draw the view: a JSON header, then the arrays that it lists, one by one.

        Little-endian; the first four bytes are the header's length, every array starts at a multiple of 4.
        """
        load, by_domain, by_rank = self.load, self.by_domain, self.by_rank
        size = load[:1].size * (1 + len(self.domains) + self.ranks) * _narrowest(load).itemsize or 1
        frames = max(1, min(MAX_FRAMES, len(self), MAX_BYTES // size))
        starts = np.linspace(0, len(self), frames + 1).astype(int)[:-1] if len(self) else np.zeros(0, int)
        thin = frames < len(self)
        framed = np.add.reduceat(load, starts) if thin else load
        framed_domains = np.add.reduceat(by_domain, starts) if thin else by_domain
        framed_ranks = np.add.reduceat(by_rank, starts) if thin else by_rank
        kind = _narrowest(framed)
        ends = [*starts[1:].tolist(), len(self)] if len(self) else []
        keep = np.unique(np.linspace(0, max(len(self) - 1, 0), _BIAS_FRAMES).astype(int))[: len(self)]
        arrays = {
            "load": framed.astype(kind),
            "domain": framed_domains.astype(kind),
            "rank": framed_ranks.astype(kind),
            "violation": self.violation.astype("<f4"),
            "bias": np.stack([self._biases[i] for i in keep]) if any(self.speeds) else np.zeros(0, "<f4"),
            "colours": _colours(),
        }
        header = {
            "title": title,
            "layers": self.layers,
            "experts": self.experts,
            "groups": self.groups,
            "domains": self.domains,
            "ranks": self.ranks,
            "steps": self.steps,
            "first": [self.steps[i] for i in starts],
            "last": [self.steps[i - 1] for i in ends],
            "bias_steps": [self.steps[i] for i in keep],
            "speed": self.speeds[-1] if self.speeds else 0.0,
            "clip": CLIP,
            "recent_steps": RECENT_STEPS,
            "palette": dict(style.PALETTE) | {"paper": style.PAPER, "ink": style.INK},
            "arrays": [],
        }
        chunks, offset = [], 0
        for name, array in arrays.items():
            data = np.ascontiguousarray(array).tobytes()
            header["arrays"].append(
                {"name": name, "dtype": array.dtype.name, "offset": offset, "count": array.size}
            )
            padding = -len(data) % 4
            chunks += [data, b"\0" * padding]
            offset += len(data) + padding
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        return len(text).to_bytes(4, "little") + text + b"".join(chunks)

    def packet_text(self, title: str = "") -> str:
        """The packet in Base64, to be embedded in a page."""
        return base64.b64encode(self.packet(title)).decode("ascii")


def relative(load: np.ndarray) -> np.ndarray:
    """Load relative to the mean over the last axis; 0 where nothing came."""
    mean = load.mean(-1, keepdims=True)
    return np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)


def _narrowest(array: np.ndarray) -> np.dtype:
    largest = int(array.max()) if array.size else 0
    return next(np.dtype(k) for k in ("u1", "<u2", "<u4") if largest <= np.iinfo(k).max)


def _colours() -> np.ndarray:
    """The diverging colour map as RGB bytes, [256, 3]: blue is idle, white the mean, red overloaded."""
    shades = matplotlib.colormaps[style.DIVERGING](np.linspace(0, 1, _COLOURS))[:, :3]
    return np.rint(shades * 255).astype(np.uint8)
