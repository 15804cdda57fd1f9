"""Peak memory of one column, measured in a process of its own per side.

Run as a script it does one piece of work and prints JSON: resident bytes before it, and the most there were
while it ran. The difference is what the work needed besides the interpreter, the libraries and the weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

MIB = 2**20


def peak_of(side: str, work: str, size: int, backend: str = "") -> dict[str, float]:
    """MiB before and at the peak of one piece of work, from a new process.

    Args:
        side: "ours" or "peer". work: "prefill" or "train". size: tokens.
        backend: the peer's, as ``str(Backend)``.
    """
    command = [sys.executable, __file__, side, work, str(size), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} {work} {size}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int:
    """Bytes of this process in memory now."""
    return psutil.Process().memory_info().rss


def high_water() -> int:
    """The most bytes this process had in memory so far (since ``forget_high_water`` where that works)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(li for li in status.read_text().splitlines() if li.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_high_water() -> None:
    """Begin the high-water mark anew, on Linux; elsewhere it stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def main(side: str, work: str, size: str, backend: str) -> None:
    """The child: build the model, do the work twice (the first run fills the allocators), report."""
    import torch
    from ours import CONFIG, Ours
    from peer import Peer, backends

    torch.set_num_threads(2)
    model = Ours(CONFIG, seed=0)
    if side == "peer":
        model = Peer(model.model)
        model.use(next(b for b in backends() if str(b) == backend))
    batch = (1, int(size)) if work == "prefill" else (8, int(size) // 8)
    ids = torch.randint(CONFIG.vocab_size, batch, generator=torch.Generator().manual_seed(0))
    forget_high_water()
    before = resident()
    if work == "train":
        model.train_step(ids)
        model.train_step(ids)
    else:
        with torch.inference_mode():
            model.logits(ids, model.cache())
    print(json.dumps({"before_mib": round(before / MIB, 1), "peak_mib": round(high_water() / MIB, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
