"""Moved to ``dsv3lib.model.inputs``; this name goes with the next version."""

import warnings

from .model.inputs import *  # noqa: F403

warnings.warn(
    "dsv3lib.inputs has moved to dsv3lib.model.inputs; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
