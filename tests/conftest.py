"""What all tests share: annotations that are checked, seeds, and a browser that is never skipped silently."""

import os
import random
import sys

import jaxtyping

# Before anything imports dsv3lib: every shape and dtype in its annotations is checked at every call.
_hook = jaxtyping.install_import_hook("dsv3lib", "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from dsv3lib.doctor import find_browser  # noqa: E402
from dsv3lib.kernels.toolchain import language  # noqa: E402

SEED = 0
ON_CI = os.environ.get("CI") == "true"

# The same examples in every run: a failure is found again by running the test again. A deadline per example
# would measure the machine's other work. `HYPOTHESIS_PROFILE=thorough` searches longer and afresh.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", derandomize=True, max_examples=25, database=None, **_common)
settings.register_profile("thorough", max_examples=500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to run without Triton where it exists: the kernels' tests would all be skipped."""
    require_triton(language.INSTALLED, sys.platform)


def require_triton(installed: bool, system: str) -> None:
    """Raises where Triton is missing on Linux; elsewhere it does not exist, and the kernels' tests are skipped."""
    if system == "linux" and not installed:
        raise pytest.UsageError("triton is not installed, and on Linux the tests need it: run make setup")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds every global generator before each test, so that no test depends on those before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The path of a Chromium, which the browser tests drive."""
    return require_browser(find_browser(), ON_CI)


def require_browser(path: str | None, on_ci: bool) -> str:
    """Returns the path; without one the test is skipped with a word of how to get it, and on CI it fails."""
    if path is None:
        advice = "no Chromium or Chrome found: sh tools/chromium.sh installs it or says how"
        (pytest.fail if on_ci else pytest.skip)(advice)
    return path
