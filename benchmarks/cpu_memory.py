"""What a picture by FLUX.1-dev takes of a CPU's memory in a budget, in fp32, from text to pixels.

    python benchmarks/cpu_memory.py [--memory 2.6GB] [--size 256] [--steps 1]

The files are sparse (zeros that take no space on the disk), in bf16, with the official names and shapes. The command
line draws in this process, whose anonymous memory is sampled from /proc; `held_gb` is its peak above what imports take,
`smallest_gb` what the plan says for that size. `--tiny` draws with flux-mini. Prints a line of JSON.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_memory import DEV, anonymous, shapes_of, write_sparse
from random_model import clip_tokenizer, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_core.device.file_plan import make_file_plan
from flux_core.device.memory import Picture
from flux_core.main import main as command_line
from flux_core.model import AutoEncoder, Flux
from flux_core.variants import VARIANTS


def write_model(folder: Path) -> list[str]:
    """Files of all parts. Returns the flags that name them."""
    write_sparse(folder / "flux.safetensors", shapes_of(Flux, DEV.params), "BF16")
    write_sparse(folder / "ae.safetensors", shapes_of(AutoEncoder, DEV.ae_params), "BF16")
    for name, kind, config, words in (
        ("t5", T5EncoderModel, T5Config(**DEV.t5_config), t5_tokenizer()),
        ("clip", CLIPTextModel, CLIPTextConfig(**DEV.clip_config), clip_tokenizer()),
    ):
        words.save_pretrained(folder / name)
        config.save_pretrained(folder / name)
        write_sparse(folder / name / "model.safetensors", shapes_of(kind, config), "BF16")
    files = {"model": "flux.safetensors", "ae": "ae.safetensors", "t5xxl": "t5", "clip-l": "clip"}
    return [word for flag, file in files.items() for word in (f"--{flag}", str(folder / file))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="2.6GB")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    peak = before = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    variant = VARIANTS["flux-mini"] if args.tiny else DEV
    with tempfile.TemporaryDirectory() as folder:
        files = [] if args.tiny else write_model(Path(folder))
        flags = ["--name", variant.name, *files, "--prompt", "a", "--seed", "1", "--device", "cpu", "--force"]
        flags += ["--memory", args.memory, "--num-steps", str(args.steps), "--output-dir", folder]
        flags += ["--width", str(args.size), "--height", str(args.size)]
        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        code = command_line(flags)
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    plan = make_file_plan(variant, 0, "float32", None, Picture(args.size, args.size))
    figures = {"held_gb": (peak - before) / 1e9, "smallest_gb": plan.smallest / 1e9, "whole_gb": plan.all / 1e9}
    figures = {"memory": args.memory, **{key: round(x, 3) for key, x in figures.items()}, "s": round(seconds, 1)}
    print(json.dumps({"benchmark": "cpu_memory", "model": variant.name, "size": args.size, **figures}))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
