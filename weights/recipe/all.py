"""The whole recipe by one command: from the two npm packages to every file that ships.

    python weights/recipe/all.py data work weights           # data: see weights/README.md; an hour of one H200
    python weights/recipe/all.py data work /tmp/weights --part 0.1

Stages that are done are in `work/minutes.json` and are not run again; what a stage was in the middle of is lost, unless
`--pause` stopped it. `--part`: every stage for that part of its minutes, scenes and steps, to see that all fits
together.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FAST, NOTO = "pytorch_lora_weights.safetensors", "noto/pytorch_lora_weights.safetensors"


class Stage(NamedTuple):
    """A command of the recipe; `ROOT`, `WORK` and `MINI` (the folder of flux-mini) stand for folders."""

    name: str
    command: str
    minutes: float = 0
    scenes: int = 0
    steps: int = 0


STAGES = (
    Stage("vocabulary", "vocab.py ROOT WORK"),
    Stage("autoencoder", "train_autoencoder.py ROOT WORK --steps 100000", minutes=5),
    Stage("scenes of 128x128", "encode.py ROOT WORK --size 128 --pairs 0.5", scenes=400_000),
    Stage("networks at 128x128", "train_transformer.py WORK --size 128 --steps 1000000 --decay-from 0.8", minutes=18),
    Stage("scenes of 256x256", "encode.py ROOT WORK --size 256 --pairs 0.42 --seed 2", scenes=300_000),
    Stage(
        "networks at 256x256",
        "train_transformer.py WORK --size 256 128 --start --steps 1000000 --drop-clip 0.5 --lr 8e-4 --decay-from 0.5",
        minutes=8,
    ),
    Stage("guidance", "distill.py WORK --steps 1000000", minutes=8),
    Stage("files", "assemble.py WORK MINI"),
    Stage("decoder", "tune_decoder.py ROOT WORK MINI", minutes=6),
    Stage("files with that decoder", "assemble.py WORK MINI"),
    Stage("four steps", "distill_steps.py WORK MINI", minutes=6),
    Stage("scorer", "train_scorer.py ROOT WORK", minutes=12),
    Stage(
        "the Noto example",
        "../../cli.py train --example noto --model MINI/flux-mini.safetensors --ae MINI/ae.safetensors "
        "--t5xxl MINI/t5 --clip_l MINI/clip --output_dir WORK/noto",
        steps=1200,
    ),
)


def command_of(stage: Stage, args: argparse.Namespace, left: float) -> list[str]:
    folders = {"ROOT": args.root, "WORK": args.work, "MINI": args.weights / "flux-mini"}
    script, *words = stage.command.split()
    for name, folder in folders.items():
        words = [word.replace(name, str(folder)) if word.split("/")[0] == name else word for word in words]
    given: dict[str, object] = {}
    if stage.minutes:
        given |= {"minutes": stage.minutes * args.part, "pause": left}
    if stage.scenes:
        given["scenes"] = int(stage.scenes * args.part)
    if stage.steps:
        given["steps"] = max(1, int(stage.steps * args.part))
    if stage.minutes or stage.scenes or stage.steps:
        given["device"] = args.device
    return [
        sys.executable,
        str(HERE / script),
        *words,
        *(x for key, value in given.items() for x in (f"--{key}", str(value))),
    ]


def ship(work: Path, weights: Path) -> None:
    """Put beside flux-mini what its own folder does not hold."""
    for made, folder in ((work / "fast" / FAST, "flux-mini-fast"), (work / NOTO, "noto")):
        (weights / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(made, weights / folder)
    shutil.copytree(work / "dinov2-mini", weights / "dinov2-mini", dirs_exist_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("work", type=Path, help="folder of states and results")
    parser.add_argument("weights", type=Path, help="folder of what ships")
    parser.add_argument("--part", type=float, default=1)
    parser.add_argument(
        "--pause", type=float, default=1e9, help="save and stop after so many minutes; run again to go on"
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    began, record = time.monotonic(), args.work / "minutes.json"
    done: dict[str, float] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage.name in done:
            continue
        left, started = args.pause - (time.monotonic() - began) / 60, time.monotonic()
        print(f"== {stage.name}", flush=True)
        path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
        if code := subprocess.run(command_of(stage, args, left), env={**os.environ, "PYTHONPATH": path}).returncode:
            print(f"{stage.name} ended with {code}. Next: the same command again, which begins there.", file=sys.stderr)
            return code
        if time.monotonic() - began >= 60 * args.pause:
            print(f"paused in {stage.name}. Next: the same command again.")
            return 0
        done[stage.name] = round((time.monotonic() - started) / 60, 2)
        record.write_text(json.dumps(done, indent=1), encoding="utf-8")
    ship(args.work, args.weights)
    print(f"{sum(done.values()):.1f} minutes in all, by stages in {record}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
