"""Moved to ``dsv3lib.model.variants``; this name goes with the next version."""

import warnings

from ..model.variants import *  # noqa: F403

warnings.warn(
    "dsv3lib.layers.variants has moved to dsv3lib.model.variants; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
