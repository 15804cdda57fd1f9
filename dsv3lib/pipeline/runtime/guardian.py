"""The watchdog process of a rank: kills it when it gives no sign of life, for a stopped process cannot end itself.

``heartbeat.Heartbeat`` runs this file by its path, with Python's own modules alone, and writes a line into it at each
beat. So it starts in some 20 ms, and holds no memory to speak of.
"""

import os
import select
import signal
import sys

_ROOM = 65536


def main(rank: int, pid: int, beat: float, silent_beats: int) -> None:
    """Return when the rank has ended; kill it after so many waits in which no line came.

    Waits are counted, not the time between lines: of a machine that was paused as a whole no rank is killed.

    Args:
        rank, pid: whose rank it is. beat: seconds of a wait. silent_beats: how many of them are too many.
    """
    missed = 0
    while missed < silent_beats:
        ready, _, _ = select.select([0], [], [], beat)
        if ready and not os.read(0, _ROOM):
            return
        missed = 0 if ready else missed + 1
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)
        why = f"no sign of life for {beat * silent_beats:g} s: stopped, or the ranks' store does not answer"
        os.write(2, f"rank {rank} (process {pid}) was killed: {why}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
