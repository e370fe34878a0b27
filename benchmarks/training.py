"""Steps of training a LoRA for FLUX.1: how many a second, and the most memory that they take.

    python benchmarks/training.py [--rows "bf16 512x512" "int8 1024x1024 blocks" …] [--elsewhere] [--compile none]

Random weights of full size, embeddings and latents of random numbers, batch 1. A row is words in any order: a dtype
(bf16, or one of `in_format.py`), a size, what is computed again (`recompute.WAYS`), `rank=4`, `targets=blocks`,
`optimizer=adamw8bit`, and `memory=8GiB`: blocks come when they compute, under a limit of the allocator. For each a line
of JSON:

it_s       steps a second, by the median of those behind the first three, loss and update included
peak_gib   the most that tensors held, and that torch reserved, in those steps
first_s    of the first step, in which blocks are compiled

`--elsewhere`: before each row in bf16 diffusers' transformer with PEFT's adapters of the same Linears, on the same
weights and by its script's loop, eager as the script, in a process of its own. `--tiny` runs small on any machine.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from latency import MODELS
from parity_diffusers import build_theirs, call_theirs
from random_parts import tiny_variant

from flux_core.device.budget import CONTEXT, bytes_of
from flux_core.kernels import install
from flux_core.sampling import image_ids, pack
from flux_core.training import PRESETS, Example, Recipe, adapt, train
from flux_core.training.plan import plan_of
from flux_core.training.recompute import WAYS
from flux_core.training.streaming import streaming
from flux_core.variants import VARIANTS

ROWS = [
    "bf16 512x512", "bf16 1024x1024", "bf16 1024x1024 mlp", "bf16 1024x1024 blocks", "int8 1024x1024",
    "int8 1024x1024 mlp", "int8 1024x1024 blocks", "nf4 512x768 blocks rank=4 optimizer=adamw8bit",
]  # fmt: skip
SETTLING = 3
"""steps that are not counted"""


@dataclass
class Row:
    """What is measured."""

    dtype: str = "bf16"
    width: int = 512
    height: int = 512
    checkpointing: str = "none"
    rank: int = 16
    targets: str = "attention"
    optimizer: str = "adamw"
    memory: str = ""

    @classmethod
    def of(cls, text: str) -> "Row":
        row = cls()
        for word in text.split():
            key, equals, value = word.partition("=")
            if equals:
                setattr(row, key, type(getattr(row, key))(value))
            elif word in WAYS:
                row.checkpointing = word
            elif word in MODELS:
                row.dtype = word
            else:
                row.width, row.height = map(int, word.split("x"))
        return row


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.variant = tiny_variant(VARIANTS["flux-dev"]) if args.tiny else VARIANTS["flux-dev"]
        self.params, self.models = self.variant.params, dict[str, Any]()

    def model(self, dtype: str) -> Any:
        """The model of the last dtype stays."""
        if dtype not in self.models:
            self.models.clear()
            self.release()
            self.models[dtype] = MODELS[dtype](self.params, self.args.device)
            install(self.models[dtype], torch.device(self.args.device))
        return self.models[dtype]

    def example(self, row: Row) -> Example:
        draw = torch.Generator(self.args.device).manual_seed(1)
        shapes = (16, row.height // 8, row.width // 8), (self.variant.max_text, self.params.context_in_dim)
        latents, txt, vec = (
            torch.randn(shape, generator=draw, dtype=torch.bfloat16, device=self.args.device)
            for shape in (*shapes, (self.params.vec_in_dim,))
        )
        return Example("x", latents.float(), txt, vec)

    def ours(self, text: str, compiled: bool) -> None:
        row = Row.of(text)
        model = self.model(row.dtype)
        adapter = adapt(model, PRESETS[row.targets], row.rank, row.rank)
        if compiled:
            self.compile(model)
        self.release()
        with self.placed(row) as fetch:
            marks = self.steps(adapter, row, fetch=fetch)
        adapter.remove()
        if compiled:
            for block in (*model.double_blocks, *model.single_blocks):
                block._compiled_call_impl = None
        self.say(text, "compiled" if compiled else "eager", marks)

    def compile(self, model: Any) -> None:
        torch._dynamo.reset()
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(dynamic=False)

    def steps(self, adapter: Any, row: Row, accumulation: int = 1, **options: Any) -> list[float]:
        """When they begin, and when each has ended. options: of `train`."""
        recipe = Recipe(
            self.args.steps, accumulation=accumulation, checkpointing=row.checkpointing, optimizer=row.optimizer
        )
        marks = [time.perf_counter()]

        def mark(done: Any) -> None:
            if len(marks) == SETTLING and self.args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.wait()
            marks.append(time.perf_counter())

        train(adapter, [self.example(row)], recipe, on_step=mark, **options)
        return marks

    @contextmanager
    def placed(self, row: Row) -> Iterator[Any]:
        """A context in which the model is whole on the device, or comes block by block in the row's memory."""
        if not row.memory:
            yield None
            return
        model, size = self.models.pop(row.dtype), (row.width, row.height)
        dtype = "bfloat16" if row.dtype == "bf16" else row.dtype
        plan = plan_of(self.variant, size, dtype, None, list(PRESETS[row.targets]), row.rank, 1, 1, "blocks", "adamw")
        model.to("cpu")
        self.release()
        budget = bytes_of(row.memory, "memory") - CONTEXT
        device = torch.device(self.args.device)
        with streaming(model, device, budget, plan.kept + plan.at_work + plan.learning) as trip:
            yield trip.fetch

    def theirs(self, text: str) -> None:
        """diffusers and PEFT, by the steps of `train_dreambooth_lora_flux.py`.

        Without cuDNN's attention, whose backward fails on diffusers' heads (torch 2.11, H200).
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        row = Row.of(text)
        torch.backends.cuda.enable_cudnn_sdp(False)
        other, one = build_theirs(MODELS["bf16"](self.params, self.args.device)).train(), self.example(row)
        for x in other.parameters():  # views of ours, some of which cuBLAS does not take
            x.data = x.data.clone()
        other.add_adapter(LoraConfig(r=row.rank, lora_alpha=row.rank, target_modules=list(PRESETS[row.targets])))
        for layer in other.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_A.float(), layer.lora_B.float()
        if row.checkpointing == "blocks":
            other.enable_gradient_checkpointing()
        learned = [x for x in other.parameters() if x.requires_grad]
        optimizer = torch.optim.AdamW(learned, 1e-4, weight_decay=1e-2)
        size, device = (row.height // 16, row.width // 16), self.args.device
        ids = image_ids(1, *size, torch.device(device))
        marks = [time.perf_counter()]
        self.release()
        for i in range(self.args.steps):
            if i == SETTLING and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            noise, latents = torch.randn_like(one.latents)[None], one.latents[None]
            sigma = torch.rand(1, device=device)
            noisy = (1 - sigma) * latents + sigma * noise
            inputs = {
                "img": pack(noisy).bfloat16(), "txt": one.txt[None], "y": one.vec[None], "timesteps": sigma.bfloat16(),
                "guidance": torch.full((1,), 3.5, device=device).bfloat16(), "img_ids": ids,
                "txt_ids": torch.zeros(1, len(one.txt), 3, device=device),
            }  # fmt: skip
            with torch.autocast(device, torch.bfloat16):
                loss = (call_theirs(other, inputs).float() - pack(noise - latents)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.wait()
            marks.append(time.perf_counter())
        self.say(text, "diffusers and PEFT", marks)

    def say(self, text: str, what: str, marks: list[float]) -> None:
        figures = self.figures(marks)
        print(json.dumps({"benchmark": "training", "row": text, "what": what, **figures}), flush=True)

    def figures(self, marks: list[float]) -> dict[str, Any]:
        seconds = [after - before for before, after in pairwise(marks)]
        step = statistics.median(seconds[SETTLING:])
        figures: dict[str, Any] = {"it_s": round(1 / step, 3), "ms": round(1000 * step, 1)}
        if self.args.device == "cuda":
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            figures["peak_gib"] = [round(size / 2**30, 2) for size in peaks]
        figures["first_s"] = round(seconds[0], 1)
        return figures

    def wait(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", choices=["blocks", "none"], default="blocks")
    parser.add_argument("--elsewhere", action="store_true")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bench = Bench(args)
    for text in args.rows:
        row = Row.of(text)
        if args.elsewhere and row.dtype == "bf16" and row.checkpointing in ("none", "blocks"):
            given = ["--theirs", "--rows", text, "--steps", str(args.steps), "--device", args.device]
            bench.models.clear()
            bench.release()
            done = subprocess.run([sys.executable, __file__, *given, *(["--tiny"] if args.tiny else [])])
            if done.returncode:
                print(
                    json.dumps({"benchmark": "training", "row": text, "error": f"theirs ended with {done.returncode}"})
                )
        try:
            bench.theirs(text) if args.theirs else bench.ours(text, args.compile == "blocks")
        except Exception as error:
            print(json.dumps({"benchmark": "training", "row": text, "error": str(error)[:400]}), flush=True)
            traceback.print_exc()
            bench.models.clear()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
