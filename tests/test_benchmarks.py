"""Each benchmark runs in its smallest form and prints its line."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_parity_with_diffusers():
    command = [
        sys.executable,
        BENCHMARKS / "parity_diffusers.py",
        "--tiny",
        "--device",
        "cpu",
        "--repeats",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["fp32_relative_l2"] <= 1e-6
    assert figures["bf16_relative_l2"] <= 2e-2
    assert figures["ratio"] > 0


def test_loading():
    command = [sys.executable, BENCHMARKS / "loading.py", "--tiny", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(one["state"], one["way"]): one for one in figures if "median_of" in one}
    assert found.keys() == {("warm", "safetensors")} | {
        (x, y) for x in ("warm", "cold") for y in ("plain", "bf16", "fp8")
    }
    assert all(one["ratio"] > 0 for one in found.values())
    assert found["warm", "bf16"]["cached"] in (1, None)


def test_the_cost_of_hooks():
    command = [sys.executable, BENCHMARKS / "hook_cost.py", "--tiny", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["ratio"].keys() == {"plain", "empty", "skip_one", "share_kv_all", "share_kv_four"}
    assert min(figures["seconds"].values()) > 0
