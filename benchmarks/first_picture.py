"""Time to a new user's first picture: the whole command, as a process, with warm disk caches.

    python benchmarks/first_picture.py [--repeat 3]

Prints a line of JSON with medians of the repeats: the command from start to file; the import of torch alone, in the
same minutes, which is not ours, and the ratio of the two; the command by parts (`parts.py`); in a process, the 28
steps with decoding; `--help` and a wrong flag; and for half as many threads as cores, as many, and twice as many, the
28 steps with decoding, and a hash of the pixels.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "import torch"
PARTS = str(ROOT / "benchmarks" / "parts.py")
INSIDE = """
import hashlib, json, time, torch
from flux_core import load_pipeline
pipeline = load_pipeline("flux-mini", "cpu")
times, pixels = [], hashlib.sha256()
for seed in range(3):
    begin = time.monotonic()
    pixels.update(pipeline.generate(f"a red apple", seed=seed)[0].tobytes())
    times.append(time.monotonic() - begin)
figures = {"first": times[0], "later": min(times[1:]), "sha256": pixels.hexdigest()[:8]}
print(json.dumps({**figures, "threads": torch.get_num_threads()}))
"""


def seconds(*command: str, code: int = 0) -> float:
    """Wall time of a process, which must end with that exit code."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True)
    elapsed = time.monotonic() - begin
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode()}")
    return elapsed


def drawn(**environment: str) -> dict[str, Any]:
    """Draw three pictures in a new process: seconds of the first and of the faster later one, threads, a hash."""
    env = os.environ | environment
    done = subprocess.run([sys.executable, "-c", INSIDE], cwd=ROOT, capture_output=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def parts(repeat: int, *flags: str) -> dict[str, float]:
    """Medians of the seconds of each part of a picture."""
    command = [sys.executable, PARTS, *flags]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, check=True) for _ in range(repeat)]
    found = [json.loads(run.stderr.splitlines()[-1]) for run in runs]
    return {part: round(statistics.median(one[part] for one in found), 3) for part in found[0]}


def median(repeat: int, *command: str, code: int = 0) -> float:
    return round(statistics.median(seconds(*command, code=code) for _ in range(repeat)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat

    with tempfile.TemporaryDirectory() as folder:
        draw = ("cli.py", "--prompt", "a red apple", "--seed", "0", "--output-dir", folder)
        seconds(*draw)  # fills the disk caches
        figures: dict[str, Any] = {"first_picture_s": median(repeat, *draw), "imports_s": median(repeat, "-c", IMPORTS)}
        figures["parts_s"] = parts(repeat, *draw[1:])
    figures["ratio_to_imports"] = round(figures["first_picture_s"] / figures["imports_s"], 2)
    steps = drawn()
    figures |= {
        "steps_and_decoding_first_s": round(steps["first"], 2),
        "steps_and_decoding_s": round(steps["later"], 2),
    }
    figures |= {
        "help_s": median(repeat, "cli.py", "--help"),
        "wrong_flag_s": median(repeat, "cli.py", "--promt", code=2),
    }
    cores = steps["threads"]
    others = (drawn(OMP_NUM_THREADS=str(number)) for number in (max(1, cores // 2), 2 * cores))
    by_threads = {one["threads"]: {"s": round(one["later"], 2), "sha256": one["sha256"]} for one in (steps, *others)}
    machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "first_picture", **figures, "threads": by_threads, **machine}))


if __name__ == "__main__":
    main()
