"""Moved to ``dsv3lib.parallel.traffic``; this name goes with the next version."""

import warnings

from ..parallel.traffic import *  # noqa: F403

warnings.warn(
    "dsv3lib.layers.traffic has moved to dsv3lib.parallel.traffic; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
