"""Stage 1: the autoencoder, from rendered scenes to 16 latent channels at an eighth of the size.

    python weights/recipe/train_autoencoder.py ROOT WORK

The loss is plain: absolute error, absolute error of the picture's gradients (edges), squared error (what PSNR counts),
and a light pull of the latents towards a normal distribution. The decoder sees latents with a little noise on them, so
that it forgives the small errors of a sampled latent. There is no perceptual or adversarial term: both need a second
network, and at this size the pictures are sharp enough without.

At the end, the latents of fresh scenes get the deviation that `scale_factor` of flux-mini's row makes 1, in the
weights themselves (`scale_latents`), so that the row is right for whatever this stage learned.
"""

import math
import os

import torch
import torch.nn.functional as F
from render import all_rgba, make_atlas, render
from scenes import sample_scenes
from sprites import load_sprites
from torch import Tensor
from trainer import Trainer, say, stage_arguments, write_shards

from flux_core.model import AutoEncoder
from flux_core.variants import VARIANTS

KL_WEIGHT = 3e-4
LATENT_NOISE = 0.03


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours along width and height."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(ae: AutoEncoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and mean squared error of a batch [B, 3, H, W] in [-1, 1]."""
    mean, logvar = ae.encoder(image).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    deviation = torch.exp(0.5 * logvar) + LATENT_NOISE
    out = ae.decoder(mean + deviation * torch.randn_like(mean)).float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(out), gradients(image), strict=True))
    mse = F.mse_loss(out, image)
    return F.l1_loss(out, image) + edges + mse + KL_WEIGHT * kl, mse.detach()


def psnr(mse: Tensor) -> float:
    """Of pictures in [-1, 1], in dB."""
    return (10 * torch.log10(4 / mse)).item()


@torch.no_grad()
def measure(ae: AutoEncoder, batches: list[Tensor]) -> dict[str, float]:
    """PSNR through the mean, and mean and deviation of normalized latents."""
    latents = [ae.encode(x) for x in batches]
    errors = [((ae.decode(z).clamp(-1, 1) - x) ** 2).mean((1, 2, 3)) for z, x in zip(latents, batches, strict=True)]
    z = torch.cat(latents)
    return {
        "psnr": (10 * torch.log10(4 / torch.cat(errors))).mean().item(),
        "mean": z.mean().item(),
        "deviation": z.std().item(),
    }


@torch.no_grad()
def scale_latents(ae: AutoEncoder, factor: float) -> None:
    """Multiply latents by a factor, without a change to what they decode to.

    The encoder's last convolution multiplies, the decoder's first divides. (A shift would not be exact: the decoder
    pads with zeros.)
    """
    mean, logvar = ae.encoder.conv_out.bias.chunk(2)
    ae.encoder.conv_out.weight.chunk(2)[0].mul_(factor)
    mean.mul_(factor)
    logvar.add_(2 * math.log(factor))
    ae.decoder.conv_in.weight.div_(factor)


def main() -> None:
    args = stage_arguments(__doc__, steps=6000, minutes=5, batch=48, lr=6e-4, data=True).parse_args()

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    sprites = load_sprites(args.root)
    say("loaded sprites")
    scenes, _ = sample_scenes(200_000, 10, sprites, k=1, workers=os.cpu_count() or 1)
    fresh, _ = sample_scenes(8 * args.batch, 11, sprites, k=1)
    say("sampled scenes")
    atlas = make_atlas(all_rgba(sprites), args.device)
    say("made the atlas")

    ae = AutoEncoder(VARIANTS["flux-mini"].ae_params).to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(ae, args.lr, args.steps, args.minutes)
    trainer.resume(args.work / "autoencoder.state.safetensors")
    step_loss = torch.compile(loss_of, dynamic=False) if args.device == "cuda" else loss_of

    for step in trainer.loop(args.pause):
        size, batch = (128, 4 * args.batch) if step % 4 == 3 else (256, args.batch)
        pick = torch.randint(len(scenes), (batch,))
        image = render(scenes[pick.numpy()], atlas, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss, mse = step_loss(ae, image)
        trainer.update(loss)
        if step % 200 == 0:
            say(f"step {step} size {size} loss {loss.item():.4f} psnr {psnr(mse):.2f}")
    trainer.save(args.work / "autoencoder.state.safetensors")
    if trainer.progress < 1:
        return
    trainer.load_average()
    seen = {
        size: [render(fresh[i : i + args.batch], atlas, size) for i in range(0, len(fresh), args.batch)]
        for size in (128, 256)
    }
    scale_latents(ae, 1 / measure(ae, seen[256])["deviation"])
    for size, batches in seen.items():
        say(f"{size}x{size}: " + " ".join(f"{k} {v:.4f}" for k, v in measure(ae, batches).items()))
    write_shards(args.work, "ae", {name: x.to(torch.bfloat16).cpu() for name, x in ae.state_dict().items()})


if __name__ == "__main__":
    main()
