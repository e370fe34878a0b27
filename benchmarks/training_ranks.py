"""Steps of training on one card and on several, in one run.

    torchrun --nproc-per-node 2 benchmarks/training_ranks.py [--rows "bf16 512x512" …] [--shard] [--compile none]

Rows, random weights and inputs are those of `training.py`; each card has one picture a step. First the first card works
alone while the others rest, then all together, then with `--shard` the base is spread over them. A line of JSON a row:

one, all, sharded   steps a second by the median of those behind the first three, pictures a second, peak memory of the
                    first card
speedup             pictures a second of all cards by those of one

`--tiny` runs small on any machine.
"""

import argparse
import json
from typing import Any

import torch
from training import Bench, Row

from flux_core.device.choice import pick_device
from flux_core.session.sharing import rank_and_world
from flux_core.training import PRESETS, adapt
from flux_core.training.ranks import Ranks, joined, own_device
from flux_core.training.sharding import shard

ROWS = ["bf16 512x512", "bf16 1024x1024", "int8 512x512", "int8 1024x1024"]


class Together(Bench):
    """`Bench`, for ranks of which each has a model of its own."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        super().__init__(args)
        self.ranks = ranks

    def row(self, text: str) -> None:
        row = Row.of(text)
        model = self.model(row.dtype)
        adapter = adapt(model, PRESETS[row.targets], row.rank, row.rank)
        if self.args.compile == "blocks":
            self.compile(model)
        found: dict[str, Any] = {}
        with self.ranks.first_alone():
            if self.ranks.is_first:
                found["one"] = self.told(self.steps(adapter, row), 1)
        found["all"] = self.together(adapter, row)
        if self.args.shard:
            self.models.clear()  # of which a part stays on each card
            shard(model, adapter.parameters(), pick_device(own_device(self.args.device)))
            self.release()
            found["sharded"] = self.together(adapter, row)
        adapter.remove()
        for block in (*model.double_blocks, *model.single_blocks):
            block._compiled_call_impl = None
        if self.ranks.is_first:
            speedup = round(found["all"]["pictures_s"] / found["one"]["pictures_s"], 3)
            about = {"benchmark": "training_ranks", "row": text, "cards": self.ranks.world}
            print(json.dumps({**about, **found, "speedup": speedup}), flush=True)

    def together(self, adapter: Any, row: Row) -> dict[str, Any]:
        world = self.ranks.world
        return self.told(self.steps(adapter, row, accumulation=world, ranks=self.ranks), world)

    def told(self, marks: list[float], pictures: int) -> dict[str, Any]:
        figures = self.figures(marks)
        return {**figures, "pictures_s": round(pictures * figures["it_s"], 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", choices=["blocks", "none"], default="blocks")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    ranks = Ranks(*rank_and_world())
    with joined(ranks, pick_device(own_device(args.device))):
        bench = Together(args, ranks)
        for text in args.rows:
            bench.row(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
