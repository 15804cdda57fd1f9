"""OpenMP's wait policy: threads that wait for one another sleep at once, instead of spinning on a core.

PyTorch splits an operation among OpenMP's threads, which wait for one another at its end. GNU's OpenMP (libgomp) lets
them spin for some milliseconds first. On an idle machine that saves a wake-up; on a busy one the waiting thread keeps
the core from the very thread that it waits for, until the scheduler's next tick: one forward pass of 128 tokens went
from 15 ms to 1,930 with two busy neighbours on two cores, in any PyTorch program. A learner's laptop, a workshop's hub
and CI are busy machines.

The policy is read from the environment when torch is loaded. ``import dsv3lib`` sets it where nobody has; so does, for
all that it starts, the ``dsv3`` command. Where torch was loaded first it is too late for that, and ``cut_spinning``
does the same by another rule of libgomp's manual: with more threads than processors it spins a hundred rounds.
``benchmarks/cpu_busy.py`` measures the choice.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import MutableMapping

POLICY = ("OMP_WAIT_POLICY", "passive")
VARIABLES = (POLICY[0], "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever set one of them has chosen
MANY_ROUNDS = 10_000  # with a thousand a busy machine's pass took 2 times the idle one, with this 20 times
LATE = "late"
HOLDER = "dsv3lib: OpenMP threads that sleep"
LIBRARY = "libgomp.so.1"  # torch ships it under this name; on macOS and Windows there is another OpenMP


def begin(environment: MutableMapping[str, str], loaded: bool) -> str:
    """Choose the wait policy where nobody has, for this process if torch is still to come, and for its children.

    Args:
        environment: of the process; a value that is there stays.
        loaded: whether torch is loaded already, which then has read the environment as it was.

    Returns:
        The policy that holds, as "OMP_WAIT_POLICY=passive", or ``LATE``.
    """
    chosen = [f"{name}={environment[name]}" for name in VARIABLES if environment.get(name)]
    if chosen:
        return ", ".join(chosen)
    name, value = POLICY
    environment[name] = value
    return LATE if loaded else f"{name}={value}"


IN_FORCE = begin(os.environ, "torch" in sys.modules)
"""What held when dsv3lib was imported; it is imported once, before or after torch."""


def spins(in_force: str) -> bool:
    """Whether a policy lets threads spin so long that other programs notice.

    Args:
        in_force: what ``begin`` returned.
    """
    chosen = dict(pair.split("=", 1) for pair in in_force.split(", ") if "=" in pair)
    rounds = chosen.get("GOMP_SPINCOUNT")  # which goes before the policy
    if rounds is not None:
        return not rounds.isdecimal() or int(rounds) > MANY_ROUNDS  # "infinite", "5M"
    return in_force == LATE or chosen.get(POLICY[0], "").lower() == "active"


def cut_spinning() -> bool:
    """Make libgomp's threads sleep after a hundred rounds, with torch loaded and nothing in the environment.

    A team of one thread more than there are processors is made by a thread that then sleeps for good, and its team with
    it: they cost no time, and libgomp counts them.

    Returns:
        Whether it could: not with another OpenMP than GNU's.
    """
    if any(thread.name == HOLDER for thread in threading.enumerate()):
        return True
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        library = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD)  # the one that torch uses, or none
        parallel, nothing = library.GOMP_parallel, ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
        threads = library.omp_get_num_procs() + 1
    except (OSError, AttributeError):
        return False
    made = threading.Event()

    def hold() -> None:
        parallel(nothing, None, ctypes.c_uint(threads), ctypes.c_uint(0))
        made.set()
        threading.Event().wait()

    threading.Thread(target=hold, name=HOLDER, daemon=True).start()
    made.wait()
    return True


def settle(threads: int, in_force: str = IN_FORCE) -> str:
    """Cut spinning short where the environment came too late, and say in one line what holds.

    Args:
        threads: torch's; one alone waits for nobody.
        in_force: what ``begin`` returned.
    """
    if threads < 2:
        return "One thread, which waits for no other."
    if in_force != LATE:
        return f"How threads wait for one another: {in_force}."
    if cut_spinning():
        return "Threads wait asleep: torch was loaded before dsv3lib, so their spinning was cut short from here on."
    return (
        f"torch was loaded before dsv3lib, too late for {'='.join(POLICY)}: on a busy machine its threads may wait "
        "long for one another. Restart the kernel and import dsv3lib before torch, or set the variable."
    )
