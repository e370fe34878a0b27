"""Stage 5: the decoder alone, on grounds that scenes do not have.

    python weights/recipe/tune_decoder.py ROOT WORK weights/flux-mini

Writes `WORK/ae_tuned-0.safetensors`: the autoencoder that ships with another decoder. The encoder is frozen, so latents
and the transformer stay as they are.

Stage 1 saw flat grounds in light colours only, and its loss counts a picture's mean: a spot in a corner is one pixel of
65,536. In a flat picture all that the encoder's norms find is the zero padding at the borders, which they enlarge until
its deviation is one, so latents there are far from those of scenes. Here scenes get grounds of all colours, graded ones
and clouds (noise with the spectrum of photographs, 1/f), some pictures have nothing on them, and the worst values of
smooth places have a loss of their own.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from render import all_rgba, make_atlas, render
from safetensors.torch import load_file
from scenes import SceneBatch, sample_scenes
from sprites import load_sprites
from torch import Tensor
from train_autoencoder import LATENT_NOISE, gradients, psnr
from trainer import Trainer, say, stage_arguments, write_shards

from flux_core.model import AutoEncoder
from flux_core.variants import VARIANTS

GROUNDS = {"own": 0.25, "flat": 0.45, "graded": 0.15, "clouds": 0.15}
"""what is behind things, and how often: the scene's colour, any one colour, one that goes over into another, noise"""
EMPTY = 0.4
"""share of pictures with nothing on them"""
SMOOTH = 1.5 / 255
"""largest difference of neighbours in a smooth place, of 1"""
WORST = 64
"""values of a picture that have a loss of their own"""


def clouds(n: int, size: int, device: str) -> Tensor:
    """Noise whose spectrum falls as 1/f, in colours that are alike, as in photographs. [n, 3, size, size] in [0, 1]"""
    f = torch.fft.fftfreq(size, device=device)
    fall = 1 / (f[:, None] ** 2 + f[None] ** 2).sqrt().clamp(min=1 / size)
    luma, chroma = (
        torch.fft.ifft2(torch.fft.fft2(torch.randn(n, c, size, size, device=device)) * fall).real for c in (1, 3)
    )
    x = luma + 0.4 * chroma
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    level, contrast = torch.rand(n, 3, 1, 1, device=device), 0.25 * torch.rand(n, 1, 1, 1, device=device)
    return (level + contrast * x).clamp(0, 1)


def colours(n: int, device: str) -> Tensor:
    """[n, 3] in [0, 1]: a third are greys, and a sixth black or white."""
    x = torch.rand(n, 3, device=device)
    draw = torch.rand(n, 1, device=device)
    x = torch.where(draw < 1 / 3, x[:, :1], x)
    return torch.where(draw < 1 / 6, x[:, :1].round(), x)


def graded(n: int, size: int, device: str) -> Tensor:
    """From one colour to another along any direction. [n, 3, size, size] in [0, 1]"""
    angle = 2 * torch.pi * torch.rand(n, 1, 1, device=device)
    line = torch.linspace(-0.5, 0.5, size, device=device)
    along = (torch.cos(angle) * line[None, :, None] + torch.sin(angle) * line[None, None]) / 2**0.5 + 0.5
    return torch.lerp(colours(n, device)[..., None, None], colours(n, device)[..., None, None], along[:, None])


def grounds(batch: SceneBatch, size: int, device: str) -> Tensor:
    """[B, 3, size, size] in [0, 1]"""
    n = len(batch)
    own = torch.from_numpy(batch.background).to(device)[..., None, None].expand(-1, -1, size, size)
    flat = colours(n, device)[..., None, None].expand_as(own)
    kinds = torch.stack([own, flat, graded(n, size, device), clouds(n, size, device)])
    kind = torch.multinomial(torch.tensor([*GROUNDS.values()], device=device), n, replacement=True)
    return kinds[kind, torch.arange(n, device=device)]


def smooth(image: Tensor) -> Tensor:
    """Where neighbours differ by no more than SMOOTH, up to three pixels around. Mask [B, 1, H, W] of [-1, 1]"""
    across, down = gradients(image)
    steep = F.pad(across.abs(), (0, 1)) + F.pad(down.abs(), (0, 0, 0, 1))
    return F.max_pool2d(steep.amax(1, keepdim=True), 7, 1, 3) <= 2 * SMOOTH


def loss_of(ae: AutoEncoder, mean: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """Loss, mean squared error, and mean of the worst errors in smooth places. [B, z, h, w], [B, 3, H, W] in [-1, 1]"""
    noise = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, device=mean.device) * torch.randn_like(mean)
    out = ae.decoder(mean + noise).float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(out), gradients(image), strict=True))
    mse = F.mse_loss(out, image)
    worst = ((out - image).abs() * smooth(image)).flatten(1).topk(WORST).values.mean()
    return F.l1_loss(out, image) + edges + mse + 0.3 * worst, mse.detach(), worst.detach()


@torch.no_grad()
def make_pool(ae: AutoEncoder, scenes: SceneBatch, atlas, size: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures as bytes [N, 3, size, size], on the device, and their latents' means."""
    images, means = [], []
    for i in range(0, len(scenes), batch):
        some = scenes[i : i + batch]
        image = render(some, atlas, size, ground=grounds(some, size, device))
        images.append(((image + 1) * 127.5).round().to(torch.uint8))
        means.append(ae.encoder(images[-1].float() / 127.5 - 1).chunk(2, dim=1)[0])
    return torch.cat(images), torch.cat(means)


@torch.no_grad()
def measure(ae: AutoEncoder, images: Tensor, means: Tensor) -> str:
    errors, worst = [], []
    for image, mean in zip(images.split(48), means.split(48), strict=True):
        x = image.float() / 127.5 - 1
        out = ae.decoder(mean)
        errors.append(((out.clamp(-1, 1) - x) ** 2).mean((1, 2, 3)))
        worst.append(((out - x).abs() * smooth(x)).amax((1, 2, 3)) * 127.5)
    found = torch.cat(worst)
    return (
        f"psnr {(10 * torch.log10(4 / torch.cat(errors))).mean():.2f} worst {found.median():.1f} to {found.max():.1f}"
    )


def main() -> None:
    parser = stage_arguments(__doc__, steps=1_000_000, minutes=5, batch=48, lr=5e-4, data=True)
    parser.add_argument("folder", help="the model that ships")
    parser.add_argument("--pool", type=int, default=30_000, help="pictures that are drawn and encoded before")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    variant, cuda, fresh = VARIANTS["flux-mini"], args.device == "cuda", 8 * args.batch
    ae = AutoEncoder(variant.ae_params).to(args.device, memory_format=torch.channels_last)
    ae.load_state_dict(load_file(os.path.join(args.folder, variant.ae_file), device=args.device))
    ae.encoder.requires_grad_(False)
    sprites = load_sprites(args.root)
    scenes, _ = sample_scenes(args.pool + fresh, 12, sprites, k=1, workers=os.cpu_count() or 1)
    scenes.sprite[np.random.default_rng(0).random(len(scenes)) < EMPTY] = -1
    atlas = make_atlas(all_rgba(sprites), args.device)
    pools = {}
    for size, part in ((256, slice(0, -fresh)), (128, slice(0, -fresh, 4))):
        pools[size] = make_pool(ae, scenes[part], atlas, size, args.batch, args.device)
    unseen = make_pool(ae, scenes[-fresh:], atlas, 256, args.batch, args.device)
    say(f"drew and encoded {len(scenes)} pictures; as it ships: {measure(ae, *unseen)}")

    trainer = Trainer(ae.decoder, args.lr, args.steps, args.minutes, decay_from=0.5)
    trainer.resume(args.work / "decoder.state.safetensors")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    step_loss = torch.compile(loss_of, dynamic=False) if cuda else loss_of
    for step in trainer.loop(args.pause):
        images, means = pools[128 if step % 4 == 3 else 256]
        rows = torch.randint(len(images), (args.batch * (4 if step % 4 == 3 else 1),), device=args.device)
        image = (images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
            loss, mse, worst = step_loss(ae, means[rows], image)
        trainer.update(loss)
        if step % 200 == 0:
            say(f"step {step} loss {loss.item():.4f} psnr {psnr(mse):.2f} worst {127.5 * worst.item():.1f}")
    trainer.save(args.work / "decoder.state.safetensors")
    trainer.load_average()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    say(f"stopped at step {trainer.step}, {trainer.progress:.0%} of the stage: {measure(ae, *unseen)}")
    write_shards(args.work, "ae_tuned", {name: x.to(torch.bfloat16).cpu() for name, x in ae.state_dict().items()})


if __name__ == "__main__":
    main()
