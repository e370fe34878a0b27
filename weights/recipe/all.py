"""The whole recipe by one command: from the two npm packages to every file that ships.

    python weights/recipe/all.py data work weights           # data: see weights/README.md; 1.5 hours of one H200
    TORCH_COMPILE_DISABLE=1 python weights/recipe/all.py data work /tmp/weights --part 0.1

Stages that are done are in `work/minutes.json` and are not run again; what a stage was in the middle of is lost, unless
`--pause` stopped it. `--part`: every stage for that part of its minutes, scenes and steps, to see that all fits
together; with `--batch 4 --device cpu` on a CPU. A small part is better not compiled: that alone takes longer than some
stages then have.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
FAST, NOTO = "pytorch_lora_weights.safetensors", "noto/pytorch_lora_weights.safetensors"


class Stage(NamedTuple):
    """A command of the recipe; `ROOT`, `WORK` and `MINI` (the folder of flux-mini) stand for folders."""

    name: str
    command: str
    minutes: float = 0
    scaled: Mapping[str, int] = MappingProxyType({})
    """numbers of which `--part` takes a part, by their flags"""


STAGES = (
    Stage("vocabulary", "vocab.py ROOT WORK"),
    Stage("autoencoder", "train_autoencoder.py ROOT WORK --steps 100000", 5),
    Stage("scenes of 128x128", "encode.py ROOT WORK --size 128 --pairs 0.5", scaled={"scenes": 400_000}),
    Stage("networks at 128x128", "train_transformer.py WORK --size 128 --steps 1000000 --decay-from 0.8", 18),
    Stage("scenes of 256x256", "encode.py ROOT WORK --size 256 --pairs 0.42 --seed 2", scaled={"scenes": 300_000}),
    Stage(
        "networks at 256x256",
        "train_transformer.py WORK --size 256 128 --start --steps 1000000 --drop-clip 0.5 --lr 8e-4 --decay-from 0.5",
        8,
    ),
    Stage("guidance", "distill.py WORK --steps 1000000", 8),
    Stage("files", "assemble.py WORK MINI"),
    Stage("decoder", "tune_decoder.py ROOT WORK MINI", 16, {"pool": 30_000}),
    Stage("files with that decoder", "assemble.py WORK MINI"),
    Stage("four steps", "distill_steps.py WORK MINI", 6, {"ways": 40_000}),
    Stage(
        "edges", "train_family.py ROOT WORK MINI canny --rank 7 --batch 96", scaled={"steps": 3900, "scenes": 16_000}
    ),
    Stage(
        "edges by official names",
        f"../../cli.py lora convert WORK/flux-mini-canny/{FAST} WORK/flux-mini-canny.safetensors --to official",
    ),
    Stage("instructions", "train_family.py ROOT WORK MINI kontext --rank 9", scaled={"steps": 4700, "scenes": 24_000}),
    Stage(
        "depth", "train_family.py ROOT WORK MINI depth --rank 32 --lr 1e-3", scaled={"steps": 2400, "scenes": 16_000}
    ),
    Stage(
        "depth by official names",
        f"../../cli.py lora convert WORK/flux-mini-depth/{FAST} WORK/flux-mini-depth.safetensors --to official",
    ),
    Stage(
        "what is kept",
        "train_family.py ROOT WORK MINI fill --rank 32 --lr 1e-3",
        scaled={"steps": 2400, "scenes": 16_000},
    ),
    Stage(
        "what is kept by official names",
        f"../../cli.py lora convert WORK/flux-mini-fill/{FAST} WORK/flux-mini-fill.safetensors --to official",
    ),
    Stage("a ControlNet", "train_beside.py ROOT WORK MINI controlnet --steps 1000000 --lr 5e-4", 4, {"scenes": 16_000}),
    Stage("scorer", "train_scorer.py ROOT WORK", 12, {"scenes": 200_000}),
    Stage("features of sprites", "sprite_features.py ROOT WORK/dinov2-mini"),
    Stage(
        "Redux", "train_beside.py ROOT WORK MINI redux --steps 1000000 --tower WORK/dinov2-mini", 4, {"scenes": 32_000}
    ),
    Stage(
        "the Noto example",
        "../../cli.py train --example noto --model MINI/flux-mini.safetensors --ae MINI/ae.safetensors "
        "--t5xxl MINI/t5 --clip_l MINI/clip --output_dir WORK/noto",
        scaled={"steps": 1200},
    ),
)


def command_of(stage: Stage, args: argparse.Namespace, left: float) -> list[str]:
    """The stage's command line. left: minutes until it is to pause."""
    folders = {"ROOT": args.root, "WORK": args.work, "MINI": args.weights / "flux-mini"}
    script, *words = stage.command.split()
    for name, folder in folders.items():
        words = [word.replace(name, str(folder)) if word.split("/")[0] == name else word for word in words]
    given: dict[str, object] = {flag: max(1, int(number * args.part)) for flag, number in stage.scaled.items()}
    if stage.minutes:
        given |= {"minutes": stage.minutes * args.part, "pause": left}
        given |= {"batch": args.batch} if args.batch else {}
    if given:
        given["device"] = args.device
    flags = (word for flag, value in given.items() for word in (f"--{flag}", str(value)))
    return [sys.executable, str(HERE / script), *words, *flags]


def ship(work: Path, weights: Path) -> None:
    """Put beside flux-mini what its own folder does not hold."""
    for made, shipped in (
        (work / "fast" / FAST, f"flux-mini-fast/{FAST}"),
        (work / NOTO, NOTO),
        (work / "flux-mini-canny.safetensors", "flux-mini-canny/flux-mini-canny.safetensors"),
        (work / "flux-mini-kontext" / FAST, "flux-mini-kontext/flux-mini-kontext.safetensors"),
        (work / "flux-mini-redux.safetensors", "flux-mini-redux/flux-mini-redux.safetensors"),
    ):
        (weights / shipped).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, weights / shipped)
    shutil.copytree(work / "dinov2-mini", weights / "dinov2-mini", dirs_exist_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("work", type=Path, help="folder of states and results")
    parser.add_argument("weights", type=Path, help="folder of what ships")
    parser.add_argument("--part", type=float, default=1)
    parser.add_argument("--batch", type=int, help="of every stage that trains; by default its own")
    parser.add_argument(
        "--pause", type=float, default=1e9, help="save and stop after so many minutes; run again to go on"
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    began, record = time.monotonic(), args.work / "minutes.json"
    found: dict[str, Any] = {"part": args.part, "done": [], "minutes": {}}
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
    done, minutes = found["done"], found["minutes"]
    if found["part"] != args.part:
        parser.error(f"{args.work} holds a run with --part {found['part']}. Next: another folder for this one")
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage.name in done:
            continue
        left, started = args.pause - (time.monotonic() - began) / 60, time.monotonic()
        if left <= 0:
            print(f"paused before {stage.name}. Next: the same command again.")
            return 0
        print(f"== {stage.name}", flush=True)
        path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
        if code := subprocess.run(command_of(stage, args, left), env={**os.environ, "PYTHONPATH": path}).returncode:
            print(f"{stage.name} ended with {code}. Next: the same command again, which begins there.", file=sys.stderr)
            return code
        paused = stage.minutes and time.monotonic() - began >= 60 * args.pause
        minutes[stage.name] = round(minutes.get(stage.name, 0) + (time.monotonic() - started) / 60, 2)
        done += [] if paused else [stage.name]
        record.write_text(json.dumps(found, indent=1), encoding="utf-8")
        if paused:
            print(f"paused in {stage.name}. Next: the same command again.")
            return 0
    ship(args.work, args.weights)
    print(f"{sum(minutes.values()):.1f} minutes in all, by stages in {record}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
