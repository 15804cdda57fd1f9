"""Word problems: every step is right, the stream is the same everywhere and does not soon repeat itself."""

import ast
import operator

from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.training.text.arithmetic import word_problem

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def value(expression: str) -> int:
    node = ast.parse(expression, mode="eval").body
    return OPERATORS[type(node.op)](node.left.value, node.right.value)


@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**9))
def test_every_step_is_right_and_the_answer_is_the_last_one(seed, index):
    question, *steps, answer = word_problem(seed, index).splitlines()
    assert question.startswith("Question: ") and question.endswith("?") and len(steps) >= 2
    for step in steps:
        expression, result = step.split(" = ")
        assert value(expression) == int(result) >= 0
    assert answer == f"Answer: {steps[-1].split(' = ')[1]}"


def test_the_stream_is_pinned():
    # Another text here would change everybody's training data.
    assert word_problem(0, 5) == (
        "Question: Greta is 32 years old. Ada is 17 years older. How old will Ada be in 5 years?\n"
        "32 + 17 = 49\n49 + 5 = 54\nAnswer: 54\n"
    )


def test_problems_and_seeds_differ():
    first = {word_problem(0, index) for index in range(2000)}
    assert len(first) > 1990
    assert not first & {word_problem(1, index) for index in range(2000)}
