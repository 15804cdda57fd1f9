"""What came of drafts: round by round, counted, and what to expect of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Round:
    """One pass of the model, row by row.

    Args:
        drafts: tokens that were drafted and judged (where a stop token stands among them, up to that one).
        accepted: how many of them stand.
        tokens: what the row gained, the accepted drafts and the model's own token; empty once it has ended.
    """

    drafts: list[list[int]]
    accepted: list[int]
    tokens: list[list[int]]


@dataclass
class SpeculationStatistics:
    """Counts over all rows and over all passes behind the prompt's own.

    Args:
        passes: times that the model was run for a row that had not ended.
        tokens: what these passes gave.
        drafted, accepted: by depth, first draft first.
    """

    passes: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, round_: Round) -> None:
        """Count one round."""
        for drafts, accepted, tokens in zip(round_.drafts, round_.accepted, round_.tokens, strict=True):
            self.passes += bool(tokens)
            self.tokens += len(tokens)
            new_depths = len(drafts) - len(self.drafted)
            self.drafted += [0] * new_depths
            self.accepted += [0] * new_depths
            for k in range(len(drafts)):
                self.drafted[k] += 1
                self.accepted[k] += k < accepted

    @property
    def acceptance(self) -> float:
        """Accepted among all drafted tokens; NaN before any was drafted."""
        return sum(self.accepted) / sum(self.drafted) if self.drafted else math.nan

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Of the drafts at each depth, the share that stood, with all before it."""
        return [a / n for a, n in zip(self.accepted, self.drafted, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the model gave (1 without speculation); NaN before any pass."""
        return self.tokens / self.passes if self.passes else math.nan


def expected_tokens_per_pass(acceptance: float, draft_tokens: int) -> float:
    """Σ_{k=0}^{m} a^k = (1 − a^{m+1}) / (1 − a): m drafts, each standing with probability a by itself."""
    return sum(acceptance**k for k in range(draft_tokens + 1))


def expected_speedup(acceptance: float, draft_tokens: int, pass_cost: float, draft_cost: float) -> float:
    """Tokens per time with speculation, over tokens per time without it (Leviathan et al., 2023, §3.3).

    Args:
        acceptance: probability that a draft stands, 0 to 1. draft_tokens: m.
        pass_cost: a pass over m + 1 tokens. draft_cost: one draft. Both over the cost of a pass over one token.
    """
    return expected_tokens_per_pass(acceptance, draft_tokens) / (pass_cost + draft_tokens * draft_cost)
