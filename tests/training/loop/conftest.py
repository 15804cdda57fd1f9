"""What the tests of the training loop share."""

from functools import partial

import pytest
from trainers import trainer_of

from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.tokenizer import default_tokenizer


@pytest.fixture(scope="session")
def text():
    """Two small domains, and the course's tokenizer."""
    return builtin_domains(("docs", "arithmetic")), default_tokenizer()


@pytest.fixture
def make(text):
    """Makes a trainer of a nano model; keyword arguments are training settings."""
    return partial(trainer_of, text)
