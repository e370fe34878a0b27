"""`train` in a process of its own, with a small random model in place of flux-mini."""

import sys
from pathlib import Path

import torch
from random_model import small_variant

from flux_core import main as command_line
from flux_core.hub import places
from flux_core.variants import VARIANTS


def main(root, flags):
    torch.set_num_threads(1)
    places.ROOTS = (Path(root),)
    VARIANTS["flux-mini"] = small_variant()
    return command_line.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
