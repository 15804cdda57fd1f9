"""How many processes this machine can hold: by its memory, by the container's, and by what a hub allows."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from ...errors import ConfigError

PROCESS_BYTES = 400_000_000
"""What one rank's process holds before its first large tensor: Python, torch, the library."""
VARIABLE = "DSV3_PROCESSES"
"""Environment variable by which a hub allows so many processes a run and no more."""

_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(groups: Path = _CGROUPS) -> int:
    """Memory that is free here, in bytes: the machine's, or what is left of this container's limit if that is less.

    Args:
        groups: where the kernel shows the container's limits.
    """
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            words = [(groups / name).read_text(encoding="ascii").strip() for name in (limit, used)]
        except OSError:
            continue
        if all(word.isdecimal() for word in words):  # "max": no limit
            free = min(free, max(0, int(words[0]) - int(words[1]) + _given_back(groups / limit)))
    return free


def _given_back(limit: Path) -> int:
    """Bytes that count as used and that the kernel takes back when it needs them: files' pages."""
    try:
        lines = (limit.parent / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file ")))


def processes_here(wanted: int, free: int | None = None, allowed: str | None = None) -> int:
    """How many processes a run may start: as many as wanted, or the next smaller even number that fits.

    Args:
        wanted: by the run. free: bytes; by default what is free now. allowed: by default what ``DSV3_PROCESSES`` says.

    Returns:
        ``wanted``, or an even number below it.

    Raises:
        ConfigError: there is no room for two, or ``DSV3_PROCESSES`` is no number.
    """
    most = _most(wanted, *_found(free, allowed))
    if most < min(wanted, 2):
        require_room(2, free, allowed)
    return wanted if most >= wanted else most - most % 2


def require_room(wanted: int, free: int | None = None, allowed: str | None = None) -> None:
    """Refuse a run for which there is no room; arguments as for :func:`processes_here`.

    Raises:
        ConfigError: says what is free and what is allowed.
    """
    free, allowed = _found(free, allowed)
    if _most(wanted, free, allowed) < wanted:
        raise ConfigError(
            f"processes: {wanted}, expected at most {_most(wanted, free, allowed)}: {free / 1e9:.1f} GB are free, "
            f"each takes {PROCESS_BYTES / 1e9:.1f} GB, and {VARIABLE} allows {allowed or 'any number'}. Take fewer "
            "stages, close other notebooks' kernels, or run this where there is more memory"
        )


def _found(free: int | None, allowed: str | None) -> tuple[int, str]:
    allowed = os.environ.get(VARIABLE, "") if allowed is None else allowed
    if allowed and not allowed.isdecimal():
        raise ConfigError(f"{VARIABLE}: {allowed!r}, expected a number of processes")
    return free_bytes() if free is None else free, allowed


def _most(wanted: int, free: int, allowed: str) -> int:
    return min(free // PROCESS_BYTES, int(allowed) if allowed else wanted)
