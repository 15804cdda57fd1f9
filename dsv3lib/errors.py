"""The typed errors of dsv3lib: each names the field, file or tensor, the value found, and the way out.

They derive from the built-in error that fits, so that ``except ValueError`` keeps working for callers
who have never heard of this library.
"""


class Dsv3Error(Exception):
    """Base of every error that dsv3lib raises on purpose."""


class ConfigError(Dsv3Error, ValueError):
    """A model, training or pipeline configuration is unknown, contradictory or out of range."""


class ScheduleError(ConfigError):
    """A pipeline schedule cannot run: an action is missing, doubled, out of order, or waits for ever."""


class InputError(Dsv3Error, ValueError):
    """An argument of a call has the wrong shape, dtype or value (token ids, masks, sampling settings)."""


class ContextLengthError(InputError):
    """A sequence is longer than the configuration's ``max_position_embeddings``."""


class CacheError(Dsv3Error, ValueError):
    """A latent cache does not fit the model, the batch or the length that it is asked to hold."""


class CheckpointError(Dsv3Error, ValueError):
    """A checkpoint is truncated, incomplete, foreign, of the wrong shape, or holds NaN."""


class SaveError(Dsv3Error, OSError):
    """A file could not be written (disk full, no permission); what stood there before is intact."""


class DataError(Dsv3Error, ValueError):
    """A data folder is empty, missing, binary, or holds no text that can be used."""


class TrainingError(Dsv3Error, RuntimeError):
    """Training cannot go on: a loss that is not finite, or a run folder that belongs to another run."""


class GradientError(Dsv3Error, RuntimeError):
    """A second derivative was asked of an operation whose backward pass is written by hand."""


class KernelError(Dsv3Error, ValueError):
    """A kernel was given operands it cannot take (dtype, device, stride, alignment, shape)."""


class CourseError(Dsv3Error, ValueError):
    """A notebook asked the course for something it does not have (an unknown exercise, a wrong seed)."""
