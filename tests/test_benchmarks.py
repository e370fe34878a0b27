"""Each benchmark runs in its smallest form and prints its line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_core.commands.save import save
from flux_core.device.memory import shares
from flux_core.variants import VARIANTS

pytestmark = pytest.mark.slow
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


def test_errors_of_attention_in_eight_bits():
    found = {(one["model"], one["what"]): one for one in lines_of("attention.py")}
    alone = {what: one["error_of_velocity"] for (model, what), one in found.items() if model == "fp32"}
    assert 0 < alone["q and k in int8, rotated, centred"] < alone["int8"] < alone["fp8"]
    assert alone["q and k in e4m3, rotated, centred"] < alone["q and k in e4m3"] / 2
    assert found["fp8", "int8"]["ratio"] > 0 and found["int8", "exact"]["error_of_velocity"] > 0


def test_where_a_pictures_seconds_go():
    exact, faster, hour = lines_of(
        "picture.py", "--dtype", "bf16", "--ways", "exact", "faster", "--rounds", "1", "--steps", "6"
    )
    assert exact["forwards"] == 6 > faster["forwards"] and exact["ratio"] == 1
    assert min(exact[part] for part in ("text", "modulation", "steps", "decoding", "host", "png")) > 0
    assert hour["pictures_an_hour"].keys() == {"apart", "beside"}


def lines_of(name, *flags):
    command = [sys.executable, BENCHMARKS / name, "--tiny", "--device", "cpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_time_that_caching_saves():
    step, image = lines_of("caching.py", "--full-size", "--compile", "none", "--rounds", "1")
    assert step["ms"].keys() == {"plain", "kept", "decided", "reused"}
    assert image["computed"] == {"plain": 4, "scheduled": 2, "decided": 2, "two in three": 2}


def test_the_quality_that_steps_left_out_cost(tmp_path):
    lines = lines_of("steps_left_out.py", "--prompts", "1", "--chart", str(tmp_path / "chart.png"))
    near = {(line["near"], line["way"].partition(":")[0].partition(" ")[0]) for line in lines}
    assert near == {(n, way) for n in (3, 2) for way in (
        "searched", "by", "plain,", "blocks", "first-block", "TeaCache", "MagCache", "TaylorSeer")}  # fmt: skip
    exact = [line["forwards"] for line in lines if line["way"].startswith(("searched", "by hand", "plain"))]
    assert exact == [line["near"] for line in lines if line["way"].startswith(("searched", "by hand", "plain"))]
    assert (tmp_path / "chart.png").is_file()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_cost_of_loras(dtype):
    (figures,) = lines_of("lora.py", "--dtype", dtype, "--compile", "none", "--rounds", "1")
    merged = {"merged"} if dtype == "bf16" else set()
    assert figures["ratio"].keys() == {"rank 16", "rank 128", "three of rank 16", *merged}
    assert figures["error"]["of_output"] == 0 and figures["error"]["change"] > 1e-3
    assert figures["scale"]["change"] > 1e-3 and figures["attach_s"]["same_bits"]


def test_pictures_by_rows_of_a_batch():
    (figures,) = lines_of("batches.py", "--dtype", "fp8", "--steps", "1", "--rounds", "1", "--batches", "2")
    assert figures["gain"].keys() == figures["pictures_an_hour"].keys() == {"1", "2"}
    assert figures["gain"]["1"] == 1 and figures["gain"]["2"] > 0


def test_steps_of_training():
    rows = "bf16 64x64 mlp", "int8 64x64 blocks memory=2GB rank=4"
    found = lines_of("training.py", "--compile", "none", "--steps", "5", "--elsewhere", "--rows", *rows)
    assert [(one["row"], one["what"]) for one in found] == [(rows[0], "eager"), (rows[1], "eager")]
    assert all(one["it_s"] > 0 for one in found)


def test_steps_of_training_by_two_processes():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--tiny", "--device", "cpu", "--compile", "none", "--steps", "4", "--shard", "--rows", "bf16 64x64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, BENCHMARKS / "training_ranks.py", *flags], capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["cards"] == 2 and figures["speedup"] > 0
    assert figures["all"]["pictures_s"] == pytest.approx(2 * figures["all"]["it_s"], abs=1e-3)
    assert figures["sharded"]["it_s"] > 0


def test_ways_of_training(tmp_path):
    """A table with a row for each; the second time it is written from what was measured."""
    command = [
        sys.executable,
        BENCHMARKS / "keeping.py",
        "--tiny",
        "--folder",
        tmp_path,
        "--only",
        "plain,a word alone",
    ]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    heads, _, *rows = first.stdout.splitlines()
    assert heads == "|  | learned | kept | near | levels | contrast | time | numbers, k |"
    assert [row.split(" | ")[0] for row in rows] == ["| plain", "| a word alone"] and again.stdout == first.stdout
    assert first.stderr.count('"took"') == 4 and '"took"' not in again.stderr


def test_a_style(tmp_path):
    *things, figures = lines_of("style.py", "--sheet", str(tmp_path / "sheet.png"))
    assert len(things) == figures["things"] == 2 and figures["unharmed"] and (tmp_path / "sheet.png").is_file()
    assert figures["lora"].keys() == figures["base"].keys() == {"style", "kept", "whole"}


def test_the_quality_that_caching_costs(tmp_path):
    flags = ["--prompts", "2", "--chart", str(tmp_path / "chart.png"), "--sheet", str(tmp_path / "sheet.jpg")]
    seed, threshold, *schedules = lines_of("caching.py", *flags)
    assert seed["setting"] == "another seed" and threshold["saved"] == threshold["change"] == 0
    assert [one["saved"] for one in schedules] == [0.25, 0.25] and all(one["change"] > 0 for one in schedules)
    assert {path.name for path in tmp_path.iterdir()} == {"chart.png", "sheet.jpg"}


def test_the_quality_that_formats_cost(tmp_path):
    saved = save("flux-mini", dtype="fp8", output=tmp_path / "saved")
    flags = ["--formats", "fp8,int8,q4_k", "--model", str(saved), "--sheet", str(tmp_path / "sheet.jpg")]
    seeds, *lines = lines_of("format_quality.py", *flags)
    found = {line["format"]: line for line in lines}
    assert seeds["format"] == "another seed" and seeds["ratio"]["levels"] == 1
    assert {name: line["units"] for name, line in found.items()} == {
        "fp8": "simulated", "int8": "simulated", "q4_k": "none", "file": "simulated",
    }  # fmt: skip
    assert 0 < found["int8"]["ratio"]["levels"] < found["fp8"]["ratio"]["levels"] < 0.5
    assert found["fp8"]["interval90"]["levels"] == [found["fp8"]["ratio"]["levels"]] * 2  # of a single prompt
    assert found["file"]["distance"] == found["fp8"]["distance"]
    assert (tmp_path / "sheet.jpg").exists()


def test_the_time_of_formats():
    lines = lines_of("latency.py", "--compile", "none", "--rounds", "1", "--steps", "1", "--dtype", "int8,nf4,q8_0")
    steps = [(line["dtype"], line["what"]) for line in lines if line["part"] == "step"]
    assert steps == [(dtype, what) for dtype in ("int8", "nf4", "q8_0") for what in ("floor", "eager")]


def test_the_sizes_of_formats(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["in_format.py"])
    import in_format

    in_format.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines:  # as plans of memory have them, but for scales
        if line["format"] in ("bf16", "fp8", "int8", "nf4"):
            share = shares(VARIANTS["flux-dev"], "bfloat16" if line["format"] == "bf16" else line["format"])[1]
            assert line["gb"] == pytest.approx(share.weights / 1e9, rel=2e-3)
            assert line["gb_without_modulation"] == pytest.approx((share.weights - share.aside) / 1e9, rel=2e-3)
    sys.modules.pop("in_format")


def test_the_error_of_a_type_for_each_block():
    lines = lines_of("mixed_quality.py")
    assert [line.get("type") for line in lines] == ["Q4_K", None, "Q5_K", None, "Q6_K", None, "Q8_0"]
    assert all(line["mixed bytes"] <= line["bytes"] for line in lines)
    assert lines[0]["mixed"] == lines[0]["one"]  # where there is no other choice


def test_the_error_of_formats():
    (figures,) = lines_of("velocity_error.py")
    of = figures["squared_to_fp8"]
    assert of["q8_0"] < of["int8"] < of["q6_k"] < of["fp8"] == 1 < of["q4_k"] < of["q4_0"]
    assert of["int8 weights"] < of["int8"] and of["int8"] < of["int6 weights"] < 1.2


def test_the_cost_of_a_second_prompt():
    command = [sys.executable, BENCHMARKS / "steering.py", "--gpu-timing", "--tiny", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = {line["what"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert figures.keys() == {"one batch", "two passes", "thresholded"}
    assert figures["two passes"]["ratio"] == 1 and figures["one batch"]["ms"] > 0


def test_pictures_of_the_server():
    flags = ["--device", "cpu", "--pictures", "2", "--steps", "1", "--rounds", "1", "--cancels", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "server.py", *flags], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    assert figures["ratio"].keys() == {"clients_1", "clients_4"} and figures["pictures_an_hour"]["bare"] > 0


def test_steps_in_a_budget():
    rates, *lines = lines_of("memory.py", "--budgets", "2MB,700KB", "--steps", "4")
    assert rates["what"] == "rates" and [line["budget"] for line in lines] == ["2MB", "700KB"]
    assert [line["copied_gb"] > 0 for line in lines] == [False, True] and all(line["equal"] for line in lines)


def test_random_budgets():
    lines = lines_of("memory.py", "--dtype", "bf16,int8", "--random", "20")
    assert [(line["pictures"], line["failed"]) for line in lines] == [(20, 0), (20, 0)]


def test_a_cold_picture(tmp_path):
    command = [sys.executable, BENCHMARKS / "cold_picture.py", tmp_path, "--tiny", "--steps", "1", "--runs"]
    done = subprocess.run([*command, "--dtype float32", "Q4_K"], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line]
    assert [(line["code"], len(line["pictures"])) for line in lines] == [(0, 1), (0, 1)]
    for line in lines:
        assert line["parts"].keys() == {"imports", "loading", "text", "steps", "decoding", "file", "else", "end"}
        assert sum(line["parts"].values()) == pytest.approx(line["seconds"], abs=0.06)


def test_a_picture_in_a_budget_of_the_cpus_memory():
    command = [sys.executable, BENCHMARKS / "cpu_memory.py", "--tiny", "--memory", "200MB", "--size", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert 0 < line["held_gb"] < 0.2 and line["smallest_gb"] < 0.2


def test_the_error_of_formats_at_full_size():
    first, *lines = lines_of("velocity_error.py", "--name", "flux-dev")
    assert first["error"] == {"kernels": 0, "plain": 0} and lines[0]["format"] == "fp8"
    assert all(line["error"]["kernels"] > 0 for line in lines)
