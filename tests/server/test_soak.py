"""A thousand requests by eight clients: none is lost, and the process takes no more memory than after the first."""

import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from running import SMALL, command

CLIENTS, FIRST, ALL = 8, 100, 1000


@pytest.mark.slow
def test_a_thousand_requests(tmp_path):
    def taken(process):
        return psutil.Process(process.pid).memory_info().rss

    with command(tmp_path) as (process, address), httpx.Client(base_url=address, timeout=120) as client:

        def ask(seed):
            body = {**SMALL, "prompt": f"a fox {seed}", "num_steps": 1, "seed": seed}
            return client.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]

        with ThreadPoolExecutor(CLIENTS) as clients:
            first = list(clients.map(ask, range(FIRST)))
            before = taken(process)
            rest = list(clients.map(ask, range(FIRST, ALL)))
        after = taken(process)
        assert client.get("/health").json() == {"status": "ok", "waiting": 0}
    print(f"{before / 2**20:.0f} MiB after {FIRST}, {after / 2**20:.0f} after {ALL}", file=sys.stderr)
    assert len(set(first + rest)) == ALL == len(list(tmp_path.glob("*.png")))
    assert after < 1.05 * before
