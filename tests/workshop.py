"""Processes that run the real command with a tiny model, forked from one that has imported everything already.

So a process costs what it does, and not seconds of imports; it can be killed, signalled and limited as any other.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SERVER = f"""
import gc, json, os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch; torch.set_num_threads(1)
import flux_core.pipeline; from tiny import tiny_pipeline; flux_core.pipeline.load_pipeline = tiny_pipeline
from flux_core.main import main
import flux_core.commands.explore, flux_core.session.latents
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.environ.update(job["env"]); os.chdir(job["folder"])
    for number in (1, 2):
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    exec(job["before"])
    os._exit(main(job["argv"]))
"""


class Done(NamedTuple):
    code: int
    log: str


class Workshop:
    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes
        )

    def start(self, folder: Path, *argv: str, before: str = "", **env: str) -> int:
        """Run `python cli.py argv` in that folder, after that line of Python. Returns its process id at once."""
        (folder / "log").touch()  # it may be killed before it opens it
        return self._ask({"folder": str(folder), "argv": [*map(str, argv)], "before": before, "env": env})

    def wait(self, pid: int, folder: Path) -> Done:
        """How it ended (a signal is negative), and what all processes of that folder have said."""
        return Done(self._ask({"wait": pid}), (folder / "log").read_text())

    def run(self, folder: Path, *argv: str, before: str = "", **env: str) -> Done:
        return self.wait(self.start(folder, *argv, before=before, **env), folder)

    def _ask(self, job: dict) -> int:
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
