"""Moved to ``dsv3lib.model.outputs``; this name goes with the next version."""

import warnings

from .model.outputs import *  # noqa: F403

warnings.warn(
    "dsv3lib.outputs has moved to dsv3lib.model.outputs; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
