"""Moved to ``dsv3lib.model.costs``; this name goes with the next version."""

import warnings

from .model.costs import *  # noqa: F403

warnings.warn(
    "dsv3lib.costs has moved to dsv3lib.model.costs; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
