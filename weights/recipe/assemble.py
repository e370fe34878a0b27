"""The last step: write the stages' results to the folder that ships, every file in its official format.

    python weights/recipe/assemble.py WORK weights/flux-mini

The autoencoder is the one with the tuned decoder, if there is one.
"""

import argparse
import shutil
from pathlib import Path

import torch
from networks import CLIP_CONFIG, T5_CONFIG, VARIANT
from torch import nn
from trainer import read_shards, restore, write
from transformers import CLIPTextModel, T5EncoderModel

from flux_core.model import AutoEncoder, Flux


def ship(module: nn.Module, path: Path, weights: dict[str, torch.Tensor]) -> None:
    """One official file: every tensor of the module, in bf16, under the module's own names."""
    restore(module, weights)
    write(path, {k: v.to(torch.bfloat16) for k, v in module.state_dict().items()}, {"format": "pt"})


def ship_text(module, folder: Path, tokenizer: Path, weights: dict[str, torch.Tensor]) -> None:
    """A text encoder as transformers keeps it: config, weights and tokenizer in one folder."""
    restore(module, weights)
    module.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()

    networks = read_shards(args.work, "networks")
    parts = {k: {n[len(k) + 1 :]: v for n, v in networks.items() if n.startswith(f"{k}.")} for k in ("t5", "clip")}
    ship(Flux(VARIANT.params), args.folder / VARIANT.flow_file, read_shards(args.work, "distilled"))
    ae = "ae_tuned" if (args.work / "ae_tuned-0.safetensors").exists() else "ae"
    ship(AutoEncoder(VARIANT.ae_params), args.folder / VARIANT.ae_file, read_shards(args.work, ae))
    ship_text(T5EncoderModel(T5_CONFIG), args.folder / VARIANT.t5, args.work / "t5_tokenizer", parts["t5"])
    ship_text(CLIPTextModel(CLIP_CONFIG), args.folder / VARIANT.clip, args.work / "clip_tokenizer", parts["clip"])
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
