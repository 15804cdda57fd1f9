"""Every setting of a training run, with the paper's values beside those that suit a run of minutes.

A run stops by steps, by tokens or by minutes; exactly one of the three is given. All else has a default. The
shares (``constant_share`` and so on) count from the end of the warm-up, which is given in steps: so nothing
in the warm-up depends on the length of the run, and a run by the clock may decide its length while it warms
up (see ``schedule.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...checks import is_number, require, require_integer
from ...errors import ConfigError
from ...fp8.recipe import NAMES as RECIPES
from .balance import DEFAULT_SPEED

# Paper §4.2: 14.8T tokens in all; the learning rate is constant to 10T, falls by a cosine over 4.3T, rests at
# a tenth for 333B tokens and at 7.3e-6 of 2.2e-4 for the last 167B. λ of the MTP loss falls with the cosine's
# beginning (10T), γ of the bias update goes to 0 at its end (14.3T).
_TOKENS = 14.8
PAPER_CONSTANT_SHARE = 10.0 / _TOKENS
PAPER_COSINE_SHARE = 4.3 / _TOKENS
PAPER_REST_SHARE = 0.333 / _TOKENS
PAPER_REST_RATIO = 2.2e-5 / 2.2e-4
PAPER_TAIL_RATIO = 7.3e-6 / 2.2e-4
DEFAULT_WARMUP_STEPS = 20

Number = float | int


@dataclass(frozen=True)
class TrainingConfig:
    """All that defines a run beside the model and the text (paper §4.2; the paper's value in brackets).

    Args:
        steps, tokens, minutes: where to stop; exactly one is given.
        decide_at: share of the minutes after which a run by the clock fixes its length, and the schedule's shares
            begin; until then the learning rate is constant. On a busy machine a late decision hits the time
            better. ``None``: at the end of the warm-up, at most a tenth.
        seed: of initialisation and data order.
        batch_size: sequences a step, when warmed up (15360). batch_size_start: at the first step (3072);
            ``None`` is a quarter of ``batch_size``. batch_warmup_steps: steps over which it grows (469B
            tokens).
        learning_rate: the peak (2.2e-4 at 671B; a small model wants more). warmup_steps: steps of linear rise
            (2000); ``None`` is a fifth of the run and at most 20.
        constant_share, cosine_share, rest_share: how the steps after the warm-up divide (10, 4.3, 0.333 of
            14.8T tokens); what is left is the tail. rest_ratio, tail_ratio: the learning rate there, relative
            to the peak (0.1 and 0.033).
        beta1, beta2, epsilon, weight_decay, gradient_clip: of AdamW (0.9, 0.95, not stated, 0.1, 1.0).
        bf16_moments: keep AdamW's moments in BF16 as the paper does (§3.3.3); FP32 where memory is no worry.
        fp8: recipe of the linear layers' products, "tile" the paper's (§3.3); ``None`` leaves the model's own.
        mtp_loss_weight, mtp_loss_weight_late: λ before and after the constant phase ends (0.3, 0.1).
        bias_speed: γ, until the cosine ends, 0 from then on (0.001; a short run needs more, see ``balance``).
        centre_bias: subtract the biases' mean after each update, so that they do not drift as a whole; not in the
            paper, off by default (see ``balance.update_bias``).
        aux_loss_alpha: α of the auxiliary balance loss (0.0001); ``None`` leaves the model's own.
        aux_loss_over: what that loss asks to be balanced, each "sequence" (the paper's choice) or the "batch".
        ema_decay: of the averaged weights on the CPU; 0 keeps none.
        checkpoint_every: steps between checkpoints; ``None`` saves at the start and the end only.
        keep_checkpoints: how many of the latest are kept.
        validate_every: steps between validations; ``None`` validates at the end only.
        validation_batches: batches of each domain; 0 never validates.
        threads: torch's threads on the CPU; part of the run, because sums are ordered by them.

    Raises:
        ConfigError: a value is out of range or contradicts another; it names the field.
    """

    steps: int | None = None
    tokens: int | None = None
    minutes: Number | None = None
    decide_at: Number | None = None
    seed: int = 0
    batch_size: int = 8
    batch_size_start: int | None = None
    batch_warmup_steps: int = 10
    learning_rate: Number = 2e-3
    warmup_steps: int | None = None
    constant_share: Number = PAPER_CONSTANT_SHARE
    cosine_share: Number = PAPER_COSINE_SHARE
    rest_share: Number = PAPER_REST_SHARE
    rest_ratio: Number = PAPER_REST_RATIO
    tail_ratio: Number = PAPER_TAIL_RATIO
    beta1: Number = 0.9
    beta2: Number = 0.95
    epsilon: Number = 1e-8
    weight_decay: Number = 0.1
    gradient_clip: Number = 1.0
    bf16_moments: bool = False
    fp8: str | None = None
    mtp_loss_weight: Number = 0.3
    mtp_loss_weight_late: Number = 0.1
    bias_speed: Number = DEFAULT_SPEED
    centre_bias: bool = False
    aux_loss_alpha: Number | None = None
    aux_loss_over: str = "sequence"
    ema_decay: Number = 0.99
    checkpoint_every: int | None = 100
    keep_checkpoints: int = 2
    validate_every: int | None = None
    validation_batches: int = 4
    threads: int | None = None

    def __post_init__(self) -> None:
        stops = {name: getattr(self, name) for name in ("steps", "tokens", "minutes")}
        given = [name for name, value in stops.items() if value is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none of them"
            raise ConfigError(f"steps, tokens, minutes: {found} given, expected exactly one place to stop")
        for name in ("batch_size", "keep_checkpoints"):
            require_integer(name, getattr(self, name), 1)
        for name in ("steps", "tokens", "batch_size_start", "checkpoint_every", "validate_every", "threads"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 1)
        if self.warmup_steps is None:
            few = DEFAULT_WARMUP_STEPS if self.steps is None else self.steps // 5
            object.__setattr__(self, "warmup_steps", max(1, min(DEFAULT_WARMUP_STEPS, few)))
        if self.batch_size_start is None:
            object.__setattr__(self, "batch_size_start", max(1, self.batch_size // 4))
        require_integer("warmup_steps", self.warmup_steps, 1)
        for name in ("batch_warmup_steps", "validation_batches", "seed"):
            require_integer(name, getattr(self, name), 0)
        self._check_numbers()

    def _check_numbers(self) -> None:
        require(
            self.batch_size_start <= self.batch_size, "batch_size_start", self.batch_size_start,
            f"at most batch_size ({self.batch_size})",
        )  # fmt: skip
        for name in ("minutes", "learning_rate", "epsilon", "gradient_clip"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and value > 0), name, value, "a finite number > 0")
        for name in (
            "weight_decay",
            "mtp_loss_weight",
            "mtp_loss_weight_late",
            "bias_speed",
            "aux_loss_alpha",
        ):
            value = getattr(self, name)
            fits = value is None and name == "aux_loss_alpha" or is_number(value) and value >= 0
            require(fits, name, value, "a finite number >= 0")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < 1, name, value, "at least 0 and below 1")
        late = self.decide_at
        require(
            late is None or (self.minutes is not None and is_number(late) and 0 < late < 1), "decide_at", late,
            "between 0 and 1, and minutes given beside it",
        )  # fmt: skip
        shares = ("constant_share", "cosine_share", "rest_share")
        for name in (*shares, "rest_ratio", "tail_ratio"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "between 0 and 1")
        total = sum(getattr(self, name) for name in shares)
        require(total <= 1 + 1e-12, " + ".join(shares), total, "at most 1 (they are shares of one run)")
        scopes = ("sequence", "batch")
        require(self.aux_loss_over in scopes, "aux_loss_over", self.aux_loss_over, " or ".join(scopes))
        fits = self.fp8 is None or self.fp8 in RECIPES
        require(fits, "fp8", self.fp8, f"null or one of {', '.join(RECIPES)}")
        for name in ("bf16_moments", "centre_bias"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """Build from the fields of a run's header.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"unknown training field {name!r}; see TrainingConfig for the fields there are"
                )
        return cls(**fields)
