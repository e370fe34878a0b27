"""The number of CPU threads to compute with: as many as the cores that this process may use.

torch counts the cores that the scheduler allows. A container is often held to a share of the machine by a quota of its
control group instead, which torch does not see: it starts a thread for every core of the machine, and all of them wait
for those that the quota has stopped. Twice the threads of the cores take twice the time (docs/figures.md).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""environment variables that torch itself reads"""
ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""where control groups are, and which are those of this process"""


def set_threads(number: int | None) -> None:
    """Set torch's number of threads. None: that of the environment, else torch's own choice within the quota."""
    import torch

    if number is None and any(os.environ.get(name) for name in VARIABLES):
        return
    torch.set_num_threads(number or math.ceil(min(torch.get_num_threads(), quota())))


def groups(controller: str, root: Path = ROOT, own: Path = OWN) -> Iterator[Path]:
    """Folders of the control groups (Linux, version 1 or 2) around this process that have a controller, from the inmost
    on; some may not be there."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inner = Path(path.lstrip("/"))  # as the machine calls it; a container may see its own group as the root
        yield from ((root / controller if controllers else root) / folder for folder in (inner, *inner.parents))


def quota(root: Path = ROOT, own: Path = OWN) -> float:
    """Cores that the control groups allow this process, as CPU time; infinity: no limit."""
    return min(map(_limit, groups("cpu", root, own)), default=math.inf)


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
