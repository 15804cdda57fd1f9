"""Run a learner's function against an exercise, and always come back with words.

Whatever the function does (raise, loop for ever, exit, print a page, return nothing), the outcome is a
:class:`Verdict`; the notebook goes on.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import linecache
import re
import signal
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from dsv3lib.course.task import Exercise, Rejected

TIME_LIMIT_SECONDS = 10.0
"""How long a check may take before the function counts as one that never ends."""

_PRINTED_LIMIT = 400


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check.

    Attributes:
        state: ``"right"``, ``"wrong"`` or ``"open"`` (not answered yet).
        text: what to tell the learner.
        line: the learner's own line where it failed, or "".
        printed: what the function printed, shortened.
    """

    state: str
    text: str
    line: str = ""
    printed: str = ""


class _TimeLimit(BaseException):
    """Raised by the alarm. Not an Exception, so that a learner's ``except Exception`` lets it through."""


def judge(exercise: Exercise, answer: Any, seconds: float = TIME_LIMIT_SECONDS) -> Verdict:
    """Return the verdict on an answer; never raises for anything the answer does.

    Args:
        exercise: what was asked.
        answer: the learner's function, or None or ``...`` while there is none.
        seconds: the time limit; kept in a main thread on Linux and macOS, not enforced elsewhere.
    """
    if answer is None or answer is Ellipsis or is_blank(answer):
        return Verdict("open", "Not answered yet. Write the body of the function, then run the cell again.")
    if not callable(answer):
        kind = type(answer).__name__
        return Verdict("wrong", f"`check` needs your function itself, without calling it; it got a {kind}.")
    printed = io.StringIO()
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(printed), _alarm(seconds):
            torch.manual_seed(0)
            exercise.checker(answer)
        verdict = Verdict("right", exercise.praise)
    except Rejected as finding:
        verdict = Verdict("wrong", _capital(str(finding)))
    except NotImplementedError:
        verdict = Verdict("open", "Not answered yet: your function raises NotImplementedError.")
    except _TimeLimit as stop:
        text = f"Stopped after {seconds:g} seconds. Does a loop in your function never end?"
        verdict = Verdict("wrong", text, _own_line(answer, stop))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() and the like must not end the kernel either
        verdict = Verdict("wrong", _in_words(error), _own_line(answer, error))
    return Verdict(verdict.state, verdict.text, verdict.line, _shorten(printed.getvalue()))


def is_blank(function: Any) -> bool:
    """Return whether a function holds nothing yet but a docstring, ``...``, ``pass`` or ``return``."""
    if not inspect.isfunction(function):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return False
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    return all(_says_nothing(statement) for statement in tree.body[0].body)


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Return):
        value = statement.value
        return value is None or (isinstance(value, ast.Constant) and value.value in (None, Ellipsis))
    if isinstance(statement, ast.Raise):
        called = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(called, ast.Name) and called.id == "NotImplementedError"
    return False


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`_TimeLimit` in the block after ``seconds``, again and again until it lets go."""
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable:
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


_BY_MESSAGE: tuple[tuple[str, str], ...] = (
    (
        r"size of tensor|mat1 and mat2|size mismatch|must match|cannot be multiplied|inconsistent tensor size",
        "the shapes of two tensors do not fit each other",
    ),
    (
        r"einsum\(\)",
        "the einsum's letters do not fit its tensors: one letter a dimension, and each letter one size",
    ),
    (r"shape '.*' is invalid|is invalid for input of size", "a reshape must keep the number of values"),
    (r"view size is not compatible", "`view` cannot do this to a transposed tensor: `reshape` can"),
    (r"ambiguous", "a tensor of several values is neither true nor false: compare with `.all()` or `.any()`"),
    (
        r"expected .*(?:dtype|scalar type)|same dtype|index.*(?:long|int64)",
        "two tensors have different dtypes, or one has a dtype that this operation does not take",
    ),
    (r"same device|on device|cuda", "tensors lie on different devices"),
    (
        r"in-place|inplace|leaf Variable",
        "an in-place operation changed what the gradient needs: make a new tensor instead",
    ),
    (
        r"does not require grad|requires grad",
        "the result is cut off from its inputs: `detach`, `item` or `no_grad` on the way",
    ),
    (r"selected index k", "`topk` is asked for more values than there are"),
    (r"out of range|out of bounds", "an index or a dimension is outside its tensor"),
    (r"not implemented for", "torch has no such operation for this dtype"),
)
"""Pattern in torch's message → what it means. What none of them knows stays torch's own sentence."""

_BY_KIND: tuple[tuple[type[BaseException], str], ...] = (
    (RecursionError, "the function calls itself without end"),
    (NameError, "a name is used that was never given a value"),
    (ZeroDivisionError, "something is divided by zero"),
    (IndexError, "an index is outside its tensor or list"),
    (KeyError, "a key is not in its dictionary"),
    (AttributeError, "a value does not have that attribute: is it of the type you think?"),
    (TypeError, "a value has a type that does not fit there, or a call has the wrong arguments"),
    (MemoryError, "the machine has not enough memory for that tensor"),
    (SystemExit, "the function tried to end the notebook's kernel"),
)


def _in_words(error: BaseException) -> str:
    message = str(error).strip().split("\n")[0] or "no message"
    opening = f"Your function raised {type(error).__name__}: {message.rstrip('.')}."
    meaning = ""
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        meaning = next((text for pattern, text in _BY_MESSAGE if re.search(pattern, str(error))), "")
    meaning = meaning or next((text for kind, text in _BY_KIND if isinstance(error, kind)), "")
    return f"{opening} In words: {meaning}." if meaning else opening


def _own_line(answer: Callable[..., Any], error: BaseException) -> str:
    """Return the last line of the learner's own code that the error passed through."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == code.co_filename]
    if not own or own[-1].lineno is None:
        return ""
    text = linecache.getline(own[-1].filename, own[-1].lineno).strip()
    return f"line {own[-1].lineno}: {text}" if text else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shorten(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _PRINTED_LIMIT else text[: _PRINTED_LIMIT - 1] + "…"
