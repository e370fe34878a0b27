"""How many CPU threads to compute with: as many as cores that this process may use.

torch counts the cores that the scheduler allows. A container is often held to a share of the machine by a quota of its
control group instead, which torch does not see: it starts a thread for every core of the machine, and all of them wait
for those that the quota has stopped. Twice the threads of the cores take twice the time (docs/figures.md).
"""

import math
import os
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""what torch itself listens to"""


def set_threads(number: int | None) -> None:
    """Compute with that many. By itself with what the environment says, else with torch's choice within the quota."""
    import torch

    if number is None and any(os.environ.get(name) for name in VARIABLES):
        return
    torch.set_num_threads(number or math.ceil(min(torch.get_num_threads(), quota())))


def quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that the control groups (Linux, either version) give this process; infinity: all."""
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
    """What one group gives: quota and period, in microseconds."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            text, period = " ".join((folder / file).read_text(encoding="utf-8") for file in files).split()
            if text not in ("max", "-1"):
                return int(text) / int(period)
        except (OSError, ValueError):  # another version, or no such group
            continue
    return math.inf
