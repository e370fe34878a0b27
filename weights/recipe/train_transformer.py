"""Stage 2: the transformer and its text encoders, by flow matching on encoded scenes.

    python weights/recipe/train_transformer.py WORK --size 128
    python weights/recipe/train_transformer.py WORK --size 256 128 --start --drop-clip 0.5

Flow matching (arXiv 2210.02747) is three lines: mix data and noise at a random time, and ask for their difference.
Times follow a logit-normal distribution, as in Stable Diffusion 3 (arXiv 2403.03206), shifted like the schedule of the
sampler. A tenth of the texts is dropped, so that classifier-free guidance works; stage 3 distils it. It takes minutes,
as the first run sees pictures of 64 tokens, and only the second the full 256, with one step in four for the small ones,
that they are not forgotten.

CLIP's vector alone is dropped far more often. It modulates every token alike, which is the easiest way to learn what
a single thing looks like and no way at all to say which thing is on the left. Given to every row, it takes all
the learning for itself: a model trained so drew the same pictures without T5, and nothing without CLIP.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import VARIANT, Networks
from safetensors.torch import load_file
from torch import Tensor
from trainer import Trainer, read_shards, restore, say, stage_arguments, write_shards

from flux_core.training import MAPS, flow_target

DROP_TEXT = 0.1
TIME_SHIFT = 0.5
"""mean of the times' logit: the schedule's mu at 256 tokens"""


class Scenes:
    """Encoded scenes on the device, and batches of them."""

    def __init__(self, path: Path, device: str, drop_clip: float = 0.0) -> None:
        data = load_file(path, device=device)
        self.latents, self.t5, self.clip = data["latents"], data["t5"], data["clip"]
        self.drop_clip = drop_clip

    def batch(self, n: int, empty: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [n, L, 64] with ids of one of their wordings; a few rows get the empty text instead."""
        device = self.latents.device
        row = torch.randint(len(self.latents), (n,), device=device)
        wording = torch.randint(self.t5.shape[1], (n,), device=device)
        t5, clip = self.t5[row, wording].long(), self.clip[row, wording].long()
        drop = torch.rand(n, 1, device=device) < DROP_TEXT
        drop_clip = drop | (torch.rand(n, 1, device=device) < self.drop_clip)
        return self.latents[row].float(), torch.where(drop, empty[0], t5), torch.where(drop_clip, empty[1], clip)


def empty_text(work: Path, t5_length: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids of the empty prompt: [1, T] and [1, C]."""
    from encode import CLIP_LENGTH, tokenize
    from transformers import CLIPTokenizer, T5TokenizerFast

    t5 = tokenize(T5TokenizerFast.from_pretrained(work / "t5_tokenizer"), [""], t5_length)
    clip = tokenize(CLIPTokenizer.from_pretrained(work / "clip_tokenizer"), [""], CLIP_LENGTH)
    return t5.long().to(device), clip.long().to(device)


def random_times(n: int, device: torch.device) -> Tensor:
    """Times in (0, 1), logit-normal around TIME_SHIFT."""
    return MAPS["logit_normal"].sigma(torch.randn(n, device=device), mean=TIME_SHIFT)


def flow_loss(nets: Networks, data: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
    """Squared error of the predicted velocity at one random time for each row."""
    noise = torch.randn_like(data)
    t = random_times(len(data), data.device)
    x = torch.lerp(data, noise, t[:, None, None])
    v = nets(x, t, t5_ids, clip_ids, torch.ones_like(t))
    return F.mse_loss(v.float(), flow_target(data, noise))


def main() -> None:
    parser = stage_arguments(__doc__, steps=16_000, minutes=9, batch=512, lr=1e-3)
    parser.add_argument("--size", type=int, nargs="+", required=True, help="one in four steps goes to the last of them")
    parser.add_argument("--start", action="store_true", help="start from the averages of an earlier run")
    parser.add_argument("--decay-from", type=float, default=0.6, help="part of the stage after which the rate falls")
    parser.add_argument("--drop-clip", type=float, default=0.8, help="share of rows that see the text through T5 only")
    args = parser.parse_args()

    torch.manual_seed(time.time_ns() % 2**32)
    torch.set_float32_matmul_precision("high")
    nets = Networks().to(args.device)
    if args.start:
        restore(nets, read_shards(args.work, "networks"))
    trainer = Trainer(nets, args.lr, args.steps, args.minutes, decay_from=args.decay_from, rates=nets.rates())
    state = args.work / f"transformer_{args.size[0]}.state.safetensors"
    trainer.resume(state)
    scenes = [Scenes(args.work / f"scenes_{size}.safetensors", args.device, args.drop_clip) for size in args.size]
    empty = empty_text(args.work, VARIANT.max_text, args.device)
    step_loss = torch.compile(flow_loss, dynamic=False) if args.device == "cuda" else flow_loss

    smooth = None
    for step in trainer.loop(args.pause):
        with torch.autocast(args.device, torch.bfloat16):
            loss = step_loss(nets, *scenes[0 if step % 4 else -1].batch(args.batch, empty))
        trainer.update(loss)
        if step % 200 == 0:
            smooth = loss.item() if smooth is None else 0.5 * smooth + 0.5 * loss.item()
            say(f"step {step} loss {smooth:.4f} lr {trainer.rate():.2e}")
        if step % 4000 == 3999:
            write_shards(args.work, "networks", trainer.average())
    trainer.save(state)
    write_shards(args.work, "networks", trainer.average())
    say(f"stopped at step {trainer.step}, {trainer.progress:.0%} of the stage")


if __name__ == "__main__":
    main()
