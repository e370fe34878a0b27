"""Seconds from starting a process to a picture's file, T5-XXL included, in budgets of a card's memory.

    python benchmarks/cold_picture.py FOLDER [--runs "--memory 12GiB" "--memory 8GiB --t5-dtype int8"] [--steps 28]
        [--dtype bf16]

Writes random weights of full size to FOLDER, unless they are there: flux-dev's transformer in int8 (15.2 GB) and in
Q4_K (6.8 GB), or in bf16 (23.8 GB), T5-XXL in bf16 (9.5 GB), and the others, with the tokenizers of the tests. Then it
runs the command line in a new process for each of `--runs`, whose flags are given as they stand; `Q4_K` in them is
that file. Prints a line of JSON for each: a hash of pixels, seconds, GiB that the process took of the card at most
(`nvidia-smi`, every tenth of a second, less what was taken before), GiB of the CPU's memory at most, the seconds by
parts (`parts.py`) with what the process takes to end, and the last lines that it said. `--tiny` runs small on any
machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from flux_core.variants import VARIANTS, Variant

RUNS = ["--memory 12GiB", "--memory 8GiB", "--memory 12GiB Q4_K", "--memory 8GiB Q4_K --t5-dtype int8"]
NAME = "flux-mini"
"""whose place the model of random weights takes, since that is a folder that needs nothing from the hub"""


def variant(tiny: bool) -> Variant:
    if tiny:
        from random_model import small_variant  # and with it transformers, which no picture waits for

        return small_variant()
    full = VARIANTS["flux-dev"]
    sizes = {"t5_size": full.t5_size, "clip_size": full.clip_size, "max_side": full.max_side}
    return replace(VARIANTS[NAME], params=full.params, ae_params=full.ae_params, max_text=full.max_text, **sizes)


def write(folder: Path, row: Variant, device: str, dtype: str, tiny: bool) -> None:
    import torch
    from in_format import quantize
    from parity_diffusers import random_flux
    from random_model import clip_tokenizer, t5_tokenizer, write_text_encoders
    from random_parts import random_autoencoder
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from flux_core.checkpoint import write_safetensors
    from flux_core.checkpoint.gguf import write_gguf
    from flux_core.checkpoint.layouts import file_state, gguf_type
    from flux_core.linears.gguf import GgufLinear

    folder.mkdir(parents=True)
    full = VARIANTS["flux-dev"]
    if tiny:
        write_text_encoders(folder, row)
    for name, kind, config, words in (
        ()
        if tiny
        else (
            ("t5", T5EncoderModel, T5Config(**full.t5_config), t5_tokenizer()),
            ("clip", CLIPTextModel, CLIPTextConfig(**full.clip_config), clip_tokenizer()),
        )
    ):
        with torch.device(device):
            model = kind._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size="20GB")
        words.save_pretrained(folder / name)
        del model
    write_safetensors(folder / row.ae_file, random_autoencoder(row, device).to("cpu").state_dict())
    flux = random_flux(row.params, device)
    if dtype == "int8":
        quantize(flux, "int8")
    write_safetensors(folder / row.flow_file, {name: x.cpu() for name, x in file_state(flux).items()})
    if dtype == "bf16":
        return
    kind = "Q8_0" if tiny else "Q4_K"
    flux = random_flux(row.params, device)
    quantize(flux, kind.lower())
    layers = {f"{name}.weight": layer for name, layer in flux.named_modules() if isinstance(layer, GgufLinear)}
    tensors: dict[str, Any] = {}
    for name, x in flux.state_dict().items():
        if layer := layers.get(name):
            tensors[name] = layer.kind, (layer.out_features, layer.in_features), partial(x.cpu)
        else:
            tensors[name] = gguf_type(name, tuple(x.shape), "BF16"), tuple(x.shape), partial(x.float().cpu)
    write_gguf(folder / "q4_k.gguf", tensors, {"general.architecture": "flux"})


def draw(folder: Path, row: Variant, flags: list[str]) -> int:
    """In the new process: the command line, with the folder's model."""
    import parts

    from flux_core.hub import places

    VARIANTS[NAME] = row
    places.ROOTS = (folder.parent,)
    code = parts.draw(flags)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"ram_gib {taken:.2f}", file=sys.stderr)
    return code


def used() -> float:
    """GiB of the card that are taken; 0 without one."""
    with suppress(OSError, ValueError):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(command, capture_output=True, text=True).stdout.split()[0]) / 1024
    return 0.0


def run(folder: Path, flags: list[str], steps: int, size: int, tiny: bool) -> dict[str, Any]:
    before, most, over = used(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            most.append(used())

    watcher = threading.Thread(target=watch, daemon=True)
    given = [str(folder / "q4_k.gguf") if flag == "Q4_K" else flag for flag in flags]
    given = [x for flag in given for x in (("--model", flag) if flag.endswith(".gguf") else (flag,))]
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            __file__,
            str(folder.parent),
            *(["--tiny"] if tiny else []),
            "--draw",
            "--name",
            NAME,
        ]
        command += ["--prompt", "a red apple", "--seed", "1", "--num-steps", str(steps), "--output-dir", output]
        command += ["--width", str(size), "--height", str(size), "--force", *given]
        began = time.perf_counter()
        watcher.start()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        over.set()
        pictures = [sha256(Image.open(path).tobytes()).hexdigest()[:16] for path in Path(output).rglob("*.png")]
    said = [line.split("\r")[-1] for line in (done.stdout + done.stderr).splitlines()]
    by_part = next((json.loads(line) for line in said if line.startswith("{")), {})
    if by_part:
        by_part["end"] = round(seconds - sum(by_part.values()), 3)
    found = {"seconds": round(seconds, 1), "parts": by_part, "code": done.returncode, "pictures": pictures}
    return {**found, "card_gib": round(max(most) - before, 2), "said": said[-12:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", nargs="*", default=RUNS, metavar="FLAGS")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--dtype", choices=["int8", "bf16"], default="int8", help="of the transformer that is written")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--draw", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, row = args.folder.resolve() / NAME, variant(args.tiny)
    if args.draw is not None:
        return draw(folder, row, args.draw)
    if not folder.exists():
        import torch

        with torch.no_grad():
            write(folder, row, "cuda" if torch.cuda.is_available() else "cpu", args.dtype, args.tiny)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    for flags in args.runs:
        found = run(folder, flags.split(), args.steps, 64 if args.tiny else 1024, args.tiny)
        print(json.dumps({"benchmark": "cold_picture", "flags": flags, "steps": args.steps, **found}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
