"""Each benchmark runs in its smallest form and prints its line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_cost_of_hooks():
    command = [sys.executable, BENCHMARKS / "hook_cost.py", "--tiny", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["ratio"].keys() == {"plain", "empty", "skip_one", "share_kv_all", "share_kv_four"}
    assert min(figures["seconds"].values()) > 0


@pytest.mark.slow
def test_the_cost_of_a_second_prompt():
    command = [sys.executable, BENCHMARKS / "steering.py", "--gpu-timing", "--tiny", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = {line["what"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert figures.keys() == {"one batch", "two passes", "thresholded"}
    assert figures["two passes"]["ratio"] == 1 and figures["one batch"]["ms"] > 0
