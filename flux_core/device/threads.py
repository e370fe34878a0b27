"""The number of CPU threads to compute with: as many as the cores that this process may use.

torch counts the cores that the scheduler allows. A container is often held to a share of the machine by a quota of its
control group instead, which torch does not see: it starts a thread for every core of the machine, and all of them wait
for those that the quota has stopped. Twice the threads of the cores take twice the time (docs/figures.md).
"""

import math
import os
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""environment variables that torch itself reads"""


def set_threads(number: int | None) -> None:
    """Set torch's number of threads. None: that of the environment, else torch's own choice within the quota."""
    import torch

    if number is None and any(os.environ.get(name) for name in VARIABLES):
        return
    torch.set_num_threads(number or math.ceil(min(torch.get_num_threads(), quota())))


def quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that the control groups (Linux, version 1 or 2) allow this process, as CPU time; infinity: no limit."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return math.inf
    least = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / "cpu" if controllers else groups
        inner = Path(path.lstrip("/"))  # as the machine calls it; a container may see its own group as the root
        least = min(least, *(_limit(root / folder) for folder in (inner, *inner.parents)))
    return least


def _limit(folder: Path) -> float:
    """Cores that one group allows: its quota over its period, both in microseconds."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            text, period = " ".join((folder / file).read_text(encoding="utf-8") for file in files).split()
            if text not in ("max", "-1"):
                return int(text) / int(period)
        except (OSError, ValueError):  # another version, or no such group
            continue
    return math.inf
