"""Pictures an hour by the server, relative to a bare loop that draws and saves, and how soon a cancelled job ends.

    python benchmarks/server.py [--name flux-mini] [--device cpu] [--pictures 12] [--steps 28] [--side 256] [--rounds 3]

The bare loop calls `pipeline.draw` and saves each picture as the server does, in a thread as the server's worker: in
the main thread a CPU draws some percent slower. One client, and four at once, ask the server for as many pictures by
HTTP. All take turns in one process with one loaded model, so what clients compute counts against the server. Prints a
line of JSON: medians of the pictures an hour; `ratio`, the median over the rounds of the server's to the bare loop's
(goal: at least 0.97); and `cancel_steps`, the time from a cancel by HTTP until nothing is drawn any more, in steps:
median and largest of `--cancels`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import uvicorn

from flux_core.commands.serve import listen
from flux_core.images.output import save_picture
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.request.generation import GenerationRequest
from flux_core.server.app import make_app
from flux_core.server.jobs import Job, Worker

WATCHED = 4
"""steps by which the time of one is measured"""


@contextmanager
def serving(worker: Worker):
    """The address of a server of that worker."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(worker), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def bare(pipeline: Pipeline, folder: Path, fields: dict[str, Any], pictures: int) -> None:
    def draw() -> None:
        for seed in range(pictures):
            request = GenerationRequest(name=pipeline.variant.name, seed=seed, **fields)
            save_picture(pipeline.draw(request, None, None, (), (), 0), folder, f"bare_seed{seed}")

    with ThreadPoolExecutor(1) as thread:
        thread.submit(draw).result()


def asked(client: httpx.Client, clients: int, fields: dict[str, Any], pictures: int) -> None:
    def ask(seed: int) -> None:
        client.post("/v1/images/generations", json=fields | {"seed": seed}).raise_for_status()

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(pictures)))


def rate(pictures: int, call: Callable[..., None], *args: Any) -> float:
    """Pictures an hour."""
    begin = time.perf_counter()
    call(*args, pictures)
    return 3600 * pictures / (time.perf_counter() - begin)


def cancelled(client: httpx.Client, worker: Worker, fields: dict[str, Any]) -> float:
    """Steps from a client's cancel until its job is over."""
    name = client.post("/v1/jobs", json=fields | {"num_steps": 400}).json()["id"]
    begin, end = (reached(worker.jobs[name], step) for step in (2, 2 + WATCHED))
    asked_at = time.perf_counter()
    client.post(f"/v1/jobs/{name}/cancel", json={})
    worker.jobs[name].over.wait()
    return (time.perf_counter() - asked_at) / ((end - begin) / WATCHED)


def reached(job: Job, step: int) -> float:
    """When a job has done so many steps."""
    while job.step < step:
        time.sleep(0.0005)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="flux-mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cancels", type=int, default=9)
    args = parser.parse_args()

    pipeline = load_pipeline(args.name, args.device)
    fields = {"prompt": "a red apple", "width": args.side, "height": args.side, "num_steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bare(pipeline, folder, fields, 1)
        worker = Worker(pipeline, folder, args.pictures)
        with serving(worker) as address, httpx.Client(base_url=address, timeout=600) as client:
            ways: dict[str, tuple[Any, ...]] = {"bare": (bare, pipeline, folder, fields)}
            ways |= {f"clients_{n}": (asked, client, n, fields) for n in (1, 4)}
            found: dict[str, list[float]] = {way: [] for way in ways}
            for i in range(args.rounds):
                for way in [*ways][i % len(ways) :] + [*ways][: i % len(ways)]:
                    found[way].append(rate(args.pictures, *ways[way]))
            cancels = [cancelled(client, worker, fields) for _ in range(args.cancels)]
    ratios = {
        way: round(statistics.median(b / a for a, b in zip(found["bare"], rates, strict=True)), 3)
        for way, rates in found.items()
        if way != "bare"
    }
    about = {key: vars(args)[key] for key in ("name", "pictures", "steps", "side", "rounds")}
    figures = {
        "pictures_an_hour": {way: round(statistics.median(rates)) for way, rates in found.items()},
        "ratio": ratios,
        "cancel_steps": [round(statistics.median(cancels), 2), round(max(cancels), 2)],
    }
    print(json.dumps({"benchmark": "server", **about, "device": str(pipeline.device), **figures}))


if __name__ == "__main__":
    main()
