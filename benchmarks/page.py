"""The page in a real Chromium, on the same cores: how soon it is there, draws and stops, and what it costs.

    python benchmarks/page.py [--steps 28] [--rounds 5]

Runs `python cli.py page` and drives it by Playwright (`pip install -e ".[page,browser]"`, and Debian's Chromium).
Prints a line of JSON: `start`, seconds from the command to a page that can be typed into (the second start, so that
files are cached); `preview`, from pressing Draw to the first preview, median; `picture`, to the finished picture,
median; `ratio`, that to a bare loop that draws and saves in a process of its own (goal: 1.10); `cancel_steps`, from
pressing Cancel until the page says so, in steps. And where /proc tells, in CPU seconds, which other work on the machine
changes less: `cpu`, a picture by server and browser, from its seed's being typed; `bare_cpu`, one of the bare loop; and
`rest`, server and browser in a second of an open page that nobody touches. Threads of the bare loop spin while they
wait, unless OMP_WAIT_POLICY=passive is set for both.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
BARE = """
import sys, time
from pathlib import Path
from flux_core import load_pipeline
from flux_core.images.output import save_picture
pipeline = load_pipeline("flux-mini", "cpu")
for seed in range(int(sys.argv[2]) + 1):
    begun, used = time.monotonic(), time.process_time()
    save_picture(pipeline.generate("a fox", seed, num_steps=int(sys.argv[3]))[0], Path(sys.argv[1]), "bare")
    print(time.monotonic() - begun, time.process_time() - used)
"""
RESTED = 10
"""seconds of an open page that nobody touches"""


@contextmanager
def command(folder: str):
    """The address of the command, and when it was started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begun = time.monotonic()
    line = [sys.executable, ROOT / "cli.py", "page", "--port", str(port), "--output-dir", folder, "--no-browser"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline()
        yield f"http://127.0.0.1:{port}", begun
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def spent() -> float:
    """CPU seconds so far of the processes under this one: server and browser, and Playwright's own, which has few."""
    seen: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            seen[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    under: set[int] = set()
    while more := {pid for pid, (parent, _) in seen.items() if parent in under | {os.getpid()}} - under:
        under |= more
    return sum(seen[pid][1] for pid in under)


def bare(folder: str, rounds: int, steps: int) -> tuple[float, float]:
    """Seconds of a picture and CPU seconds, without the first."""
    line = [sys.executable, "-c", BARE, folder, str(rounds), str(steps)]
    lines = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[1:]
    seconds, used = (statistics.median(map(float, times)) for times in zip(*map(str.split, lines), strict=True))
    return seconds, used


def draw(page: Page, seed: int, steps: int) -> tuple[float, float, float]:
    """Seconds to the first preview, and to the picture; and CPU seconds."""
    used = spent()
    page.locator("#seed input").fill(str(seed))
    page.locator("#num_steps input").fill(str(steps))
    page.keyboard.press("Tab")
    time.sleep(0.5)
    before = page.evaluate("document.querySelector('#picture img')?.src")
    begun = time.monotonic()
    page.click("#draw")
    changed = "old => { const one = document.querySelector('#picture img'); return one && one.src !== old }"
    page.wait_for_function(changed, arg=before, polling=10)
    first = time.monotonic() - begun
    said(page, "done", 300)
    return first, time.monotonic() - begun, spent() - used


def said(page: Page, word: str, seconds: float, polling: int = 50) -> None:
    """Wait until the page says so. polling: in milliseconds; to look costs time on the cores that draw."""
    found = "word => document.querySelector('#said').textContent.includes(word)"
    page.wait_for_function(found, arg=word, polling=polling, timeout=1000 * seconds)


def opened(browser: object, address: str) -> Page:
    page: Page = browser.new_page()  # type: ignore[attr-defined]
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        alone, bare_cpu = bare(folder, args.rounds, args.steps)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(2):
            with command(folder) as (address, begun):
                page = opened(browser, address)
                start = time.monotonic() - begun
                page.close()
        with command(folder) as (address, _):
            page = opened(browser, address)
            time.sleep(RESTED)
            used = spent()
            time.sleep(RESTED)
            rest = (spent() - used) / RESTED
            page.locator("#prompt textarea").fill("a fox")
            page.get_by_role("button", name="Settings").click()
            draw(page, 0, 2)
            found = [draw(page, seed, args.steps) for seed in range(1, args.rounds + 1)]
            page.locator("#num_steps input").fill("500")
            page.keyboard.press("Tab")
            page.click("#draw")
            said(page, "of 500", 60)
            time.sleep(1)
            begun = time.monotonic()
            page.click("#cancel")
            said(page, "cancelled", 60, 10)
            cancel = time.monotonic() - begun
        browser.close()
    previews, pictures, cpu = (statistics.median(times) for times in zip(*found, strict=True))
    step = pictures / args.steps
    figures = {"start": start, "preview": previews, "picture": pictures, "ratio": pictures / alone,
               "cancel_steps": cancel / step, "cpu": cpu, "bare_cpu": bare_cpu, "rest": rest}  # fmt: skip
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
