"""Exercise spec.3: what stays in the cache after a pass."""

from __future__ import annotations

from collections.abc import Callable

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer


def kept(cached: int, drafts: int, accepted: int) -> int:
    """Latents that may stay in the cache after a pass over the newest token and its drafts."""
    return cached + 1 + accepted


def _check(answer: Callable[[int, int, int], object]) -> None:
    for cached, drafts, accepted in ((10, 4, 2), (0, 3, 0), (7, 1, 1), (40, 5, 3), (5, 3, 3), (9, 0, 0)):
        got, right = answer(cached, drafts, accepted), kept(cached, drafts, accepted)
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            raise Rejected("return a number of tokens.")
        if got == right:
            continue
        slips = {
            "nothing is rolled back: the drafts that fell stay, and later tokens read them.": cached + 1 + drafts,
            "the newest confirmed token was read in this pass too; its latent stays.": cached + accepted,
            "the model's own token is not in the cache yet: no pass has read it.": cached + 2 + accepted,
            "the drafts that stood were read behind right tokens: they stay.": cached + 1,
            "what was cached before the pass stays as it is.": 1 + accepted,
            "all of the pass is thrown away: then the next one must read it again.": cached,
        }
        for why, slip in slips.items():
            if got == slip:
                raise Rejected(why)
        case = f"{cached} were cached, {drafts} drafted and {accepted} stood"
        raise Rejected(f"{case}: {right} may stay, yours says {got}.")


EXERCISES = (
    Exercise(
        id="spec.3",
        title="Roll the cache back",
        dots=2,
        minutes=5,
        prompt="Write `kept(cached, drafts, accepted)`. Before the pass so many tokens had a latent in the cache. "
        "The pass reads the newest confirmed token, which had none yet, and the drafts behind it; some of them "
        "stand, then the model says one token of its own. How many latents may stay?",
        solution=kept,
        checker=_check,
        spec=(
            ("cached", "an integer", "latents before the pass"),
            ("drafts, accepted", "integers", "drafts read; those that stood, from the front"),
            ("returns", "an integer", "latents that stay"),
        ),
        hints=(
            "Which tokens were read in this pass with nothing but right tokens before them?",
            "The model's own token was said, not read: it has no latent yet.",
        ),
        also_right=(
            RightAnswer("what was read, less what fell", lambda c, d, a: c + 1 + d - (d - a)),
            RightAnswer("the length of lists", lambda c, d, a: len([*range(c), 0, *range(a)])),
            RightAnswer("with min", lambda c, d, a: c + 1 + min(a, d)),
            RightAnswer("as a float", lambda c, d, a: float(c + a + 1)),
        ),
        wrong=(
            WrongAnswer("no rollback", lambda c, d, a: c + 1 + d, says="rolled back"),
            WrongAnswer("the newest forgotten", lambda c, d, a: c + a, says="newest"),
            WrongAnswer("the own token counted", lambda c, d, a: c + 2 + a, says="own token"),
            WrongAnswer("standing drafts dropped", lambda c, d, a: c + 1, says="stood"),
            WrongAnswer("the past forgotten", lambda c, d, a: 1 + a, says="before the pass"),
            WrongAnswer("the whole pass dropped", lambda c, d, a: c, says="thrown away"),
        ),
        praise="A cache of latents is cut by moving one number: nothing is copied.",
    ),
)  # fmt: skip
