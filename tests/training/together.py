"""What two processes of torchrun train together, for `test_ranks.py`: `together.py FOLDER`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from small import RECIPE, examples, small_adapter

from flux_core.errors import FluxError, NonFiniteError
from flux_core.session.sharing import rank_and_world
from flux_core.training import train
from flux_core.training.ranks import Ranks, joined
from flux_core.training.sharding import gathered, shard

DEALT, SPLIT = RECIPE, replace(RECIPE, batch=4, accumulation=1, ema=0.9)
SHARDED = replace(RECIPE, checkpointing="blocks")
STOP = 7


def together(folder, ranks):
    """Losses, and errors' texts, by name."""

    def run(name, recipe=DEALT, some=None, **options):
        return train(small_adapter(), some or examples(), recipe, folder / name, ranks=ranks, **options)

    found = {name: run(name, recipe) for name, recipe in [("dealt", DEALT), ("split", SPLIT), ("begun alone", SPLIT)]}
    found["stopped"] = run("stopped", on_step=lambda done: ranks.rank == 1 and done.step == STOP)
    adapter = small_adapter()
    shard(adapter.model, adapter.parameters(), torch.device("cpu"))
    (linear,) = (x for x in adapter.model.double_blocks[0].img_mlp[0].parameters() if x.ndim == 2)
    found["part"] = [linear.to_local().numel() / linear.numel()]
    found["sharded"] = train(adapter, examples(), SHARDED, folder / "sharded", ranks=ranks)
    with gathered(adapter.model, "double_blocks.0.img_mlp.0"):
        found["whole"] = adapter.model.double_blocks[0].img_mlp[0].weight.flatten().tolist()
    found["changes"] = adapter.changes()
    bad = [one._replace(latents=one.latents * torch.nan) if one.name == "3.png" else one for one in examples()]
    try:
        run("unstable", some=bad)
    except NonFiniteError as error:
        found["unstable"] = str(error)
    adapter = small_adapter()
    adapter.parameters()[0].data += ranks.rank
    try:
        train(adapter, examples(), DEALT, folder / "apart", ranks=ranks)
    except FluxError as error:
        found["apart"] = str(error)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, ranks = Path(sys.argv[1]), Ranks(*rank_and_world())
    with joined(ranks, torch.device("cpu")):
        print("only the first one speaks")
        told = together(place, ranks)
    (place / f"{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
