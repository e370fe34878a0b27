"""Servers on free ports of this machine, over a pipeline that the tests of this folder share."""

import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from flux_core.commands.serve import listen
from flux_core.server.app import make_app
from flux_core.server.jobs import Worker

SMALL = {"size": "128x128", "seed": 5}


class Running:
    """A server on a free port."""

    def __init__(self, pipeline, folder, most=100, **settings):
        self.worker = Worker(pipeline, folder, most)
        listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(make_app(self.worker, **settings), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def job(self, **body):
        return self.client.post("/v1/jobs", json={"prompt": "a fox", **SMALL, **body})

    def wait(self, name, *states):
        for _ in range(1200):
            job = self.client.get(f"/v1/jobs/{name}").json()
            if job["state"] in states:
                return job
            time.sleep(0.02)
        raise AssertionError(job)

    def close(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def command(folder, *flags):
    """The command `serve` as a process that answers, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "flux_core", "serve", "--port", str(port), "--output-dir", str(folder), *flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert re.search(rf"flux-mini on http://127\.0\.0\.1:{port}/v1", process.stdout.readline())
        for _ in range(200):
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()
