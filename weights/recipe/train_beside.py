"""Stage 7: what steers flux-mini from beside, while it stays as it is: a ControlNet of edges, and Redux's two layers.

    python weights/recipe/train_beside.py ROOT WORK weights/flux-mini controlnet
    python weights/recipe/train_beside.py ROOT WORK weights/flux-mini redux

Writes `WORK/flux-mini-KIND.safetensors`. A ControlNet begins as the first blocks of flux-mini, with residuals of zero
(arXiv 2302.05543, section 3.1); its loss is that of flux-mini's velocity without guidance. Redux's layers learn words
of what two blocks of dinov2-mini see of a thing, alone, of another size and at another place; half of the pictures are
of two things, each seen in a picture of its own. At first they are to hold the words that T5 has for a plain caption,
in any order; then flux-mini is to say with them, three times in four without others, what it says of that caption.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import Scene
from heldout import load_heldout
from palette import BACKGROUNDS, COLOURS
from render import all_rgba, make_atlas
from safetensors.torch import load_file
from scenes import Pools, SceneBatch, sample_scene
from scenes import pack as batched
from sprites import load_sprites
from torch import Tensor, nn
from train_family import SIZE, VARIANT, Encoder, Pool, pictures, pool_of
from trainer import Trainer, say, stage_arguments, write
from words import article, with_article

from flux_core.hub.places import scorer_folder
from flux_core.model import ControlNet, Flux
from flux_core.params import ControlNetParams
from flux_core.pipeline.controlnet import ControlNetCondition
from flux_core.pipeline.family import Words
from flux_core.sampling import FlowInputs, image_ids, pack
from flux_core.training.objective import MAPS, flow_target, noised
from flux_core.variants import VARIANTS
from flux_core.vision.networks import load_network
from flux_core.vision.redux import DINOV2, Redux

TOKENS = (SIZE // 16) ** 2
ALIKE = 0.1
"""part of the way in which a picture's words learn to be like T5's, before flux-mini reads them"""


def flux_on(folder: Path, device: str) -> Flux:
    """flux-mini, frozen."""
    model = Flux(VARIANT.params)
    model.load_state_dict(load_file(folder / VARIANT.flow_file))
    return model.to(device, torch.float32).requires_grad_(False)


class Edges:
    """A ControlNet of Canny maps: two double and two single blocks."""

    def __init__(self, flux: Flux) -> None:
        own = {"depth": 2, "depth_single_blocks": 2, "guidance_embed": False}
        blocks = flux.params.depth, flux.params.depth_single_blocks
        self.net = ControlNet(ControlNetParams(**{**vars(flux.params), **own, "blocks": blocks}))
        there, shared = self.net.state_dict(), flux.state_dict()
        self.net.load_state_dict({name: shared[name] for name in there if name in shared}, strict=False)
        self.net.pos_embed_input.load_state_dict(flux.img_in.state_dict())  # a map's latent is a picture's
        for layer in (*self.net.controlnet_blocks, *self.net.controlnet_single_blocks):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.net.to(flux.img_in.weight.device)
        # they read blocks' outputs, whose deviation is 6 to 30: at AdamW's full rate a step would move the picture far
        self.rates = {name: 0.1 for name, _ in self.net.named_parameters() if name.startswith("controlnet_")}

    def pools(self, count: int, root: Path, encoder: Encoder) -> list[Pool]:
        return [pool_of("canny", count, root, encoder, seed=4)]

    def sigma(self, draws: Tensor) -> Tensor:
        return MAPS["flux_shift"].sigma(draws, tokens=TOKENS)

    def wanted(self, flux: Flux, inputs: FlowInputs, x: Tensor, sigma: Tensor, flow: Tensor) -> Tensor:
        return flow

    def velocity(self, flux: Flux, inputs: FlowInputs, seen: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """By the run that draws; its sigma is that of a step, and here each row has its own."""
        cond, given = pack(seen[:, 0]), (inputs.img_ids, inputs.txt, inputs.txt_ids, sigma, inputs.vec)
        run = ControlNetCondition(self.net, cond).run(inputs)
        run.residuals = self.net.placed(self.net(x, given[0], cond, *given[1:]))
        return flux(x, *given, inputs.guidance, run=run)


class Seen:
    """Redux's layers, of the official shape: three times as many features between them as a word has."""

    def __init__(self, flux: Flux, tower: Path | None = None) -> None:
        """tower: the folder of what sees; by default what ships."""
        self.rates: dict[str, float] = {}
        device, width = flux.img_in.weight.device, flux.params.context_in_dim
        takes = VARIANTS["flux-mini-redux"].takes
        folder = tower or scorer_folder(takes.words)
        sees = load_network(DINOV2, takes.words, device, torch.float32, folder)
        self.redux = Redux(*sees, 3 * width, width, torch.float32, takes.layers, takes.side)
        self.net = nn.ModuleDict({name: getattr(self.redux, name) for name in ("redux_up", "redux_down")})
        for linear in self.net.values():
            linear.to_empty(device=device).reset_parameters()

    def pools(self, count: int, root: Path, encoder: Encoder) -> list[Pool]:
        """Scenes of one thing, and of two."""
        sprites, rng = load_sprites(root), np.random.default_rng(5)
        meta, atlas, dice = sprites.without_pixels(), make_atlas(all_rgba(sprites), encoder.device), random.Random(5)
        known, found = Pools(meta, load_heldout(meta)), []
        self.silence = encoder.texts([""])
        with torch.no_grad():  # at first every word says nothing
            self.redux.redux_down.weight.mul_(0.1)
            self.redux.redux_down.bias.copy_(self.silence[0].mean((0, 1)))
        for things, shares in ((1, [0.4, 0.5, 0, 0, 0.1]), (2, [0, 0, 0.95, 0, 0.05])):
            known.shares = shares
            some = [scene_of(things, dice, known) for _ in range(count // 2)]
            latents, seen = [], []
            for i in range(0, len(some), 256):
                scenes = batched(some[i : i + 256])
                latents.append(encoder.latents(pictures(scenes, atlas)))
                shown = [pictures(alone(scenes, layer, rng), atlas) for layer in range(things)]
                seen.append(torch.stack([self.features(image) for image in shown], 1))
            found.append(Pool(torch.cat(latents), torch.cat(seen), *encoder.texts([caption(scene) for scene in some])))
            say(f"drew and encoded {len(some)} scenes of {things}")
        return found

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """[B, T, D] of pictures [B, 3, H, W], resized as the processor does it."""
        side = self.redux.tower.config.image_size
        small = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.redux.seen(small).bfloat16()

    def said(self, seen: Tensor) -> Tensor:
        """Words [B, N T, D] of the features [B, N, T, F] of N pictures."""
        return self.redux.said(seen.flatten(1, 2))

    def unlike(self, inputs: FlowInputs, seen: Tensor) -> Tensor:
        """How far each of T5's words is from the nearest of the pictures', squared."""
        return torch.cdist(inputs.txt, self.said(seen)).square().amin(2).mean()

    def sigma(self, draws: Tensor) -> Tensor:
        """Half of them above 0.86: below, flux-mini goes by the picture, and hardly reads."""
        return MAPS["shift"].sigma(draws, shift=6.0)

    @torch.no_grad()
    def wanted(self, flux: Flux, inputs: FlowInputs, x: Tensor, sigma: Tensor, flow: Tensor) -> Tensor:
        """What flux-mini says of the caption, in which there is no noise."""
        return flux(x, inputs.img_ids, inputs.txt, inputs.txt_ids, sigma, inputs.vec, inputs.guidance)

    def velocity(self, flux: Flux, inputs: FlowInputs, seen: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        silent = len(x) * 3 // 4
        txt, vec = (
            torch.cat([nothing.to(every).expand_as(every[:silent]), every[silent:]])
            for nothing, every in zip(self.silence, (inputs.txt, inputs.vec), strict=True)
        )
        inputs = Words(self.said(seen)).apply(replace(inputs, txt=txt, vec=vec), (SIZE, SIZE))
        return flux(x, inputs.img_ids, inputs.txt, inputs.txt_ids, sigma, inputs.vec, inputs.guidance)


def scene_of(things: int, rng: random.Random, known: Pools) -> Scene:
    """A scene of so many things."""
    while len((scene := sample_scene(rng, known)).things) != things:
        pass
    return scene


def caption(scene: Scene) -> str:
    """What is there, and the name that is nearest to its ground's colour, always in the same words."""
    colours = (f"{COLOURS[thing.colour].names[0]} " if thing.colour >= 0 else "" for thing in scene.things)
    named = ((thing.name, colour + thing.name) for colour, thing in zip(colours, scene.things, strict=True))
    things = " and ".join(with_article(phrase, name) for name, phrase in named)
    ground = min(BACKGROUNDS, key=lambda name: math.dist(BACKGROUNDS[name], scene.background))
    return f"{things} on {article(ground)} {ground} background"


def alone(scenes: SceneBatch, layer: int, rng: np.random.Generator) -> SceneBatch:
    """The thing of a layer by itself, in another size and at another place, on the same ground."""
    n = len(scenes)
    sprite, colour = np.full_like(scenes.sprite, -1), np.full_like(scenes.colour, -1)
    sprite[:, 0], colour[:, 0] = scenes.sprite[:, layer], scenes.colour[:, layer]
    xy, size = np.full_like(scenes.xy, 0.5), rng.uniform(0.5, 0.9, scenes.size.shape).astype(np.float32)
    xy[:, 0] += rng.uniform(-0.5, 0.5, (n, 2)) * (1 - size[:, :1])
    return SceneBatch(sprite, xy, size, colour, scenes.background, scenes.kind)


def batch_of(pool: Pool, size: int, dice: torch.Generator) -> tuple[Tensor, Tensor, FlowInputs]:
    """Latents, what is seen beside each, and the model's inputs."""
    device, per = pool.latents.device, len(pool.txt) // len(pool.latents)
    i = torch.randint(len(pool.latents), (size,), generator=dice, device=device)
    j = i * per + torch.randint(per, (size,), generator=dice, device=device)
    latents, txt = pool.latents[i].float(), pool.txt[j].float()
    ids = image_ids(size, latents.shape[2] // 2, latents.shape[3] // 2, device)
    txt_ids = torch.zeros(*txt.shape[:2], 3, device=device)
    guidance = torch.ones(size, device=device)
    return latents, pool.seen[i].float(), FlowInputs(ids, txt, txt_ids, pool.vec[j].float(), guidance)


def loss_of(
    kind: Edges | Seen, flux: Flux, pool: Pool, size: int, dice: torch.Generator, progress: float = 1.0
) -> Tensor:
    """The squared error of the velocity, at noise and levels of each row's own; at first that of Redux's words."""
    latents, seen, inputs = batch_of(pool, size, dice)
    if isinstance(kind, Seen) and progress < ALIKE:
        return kind.unlike(inputs, seen)
    noise = torch.randn(latents.shape, generator=dice, device=latents.device)
    draws = torch.randn(size, generator=dice, device=latents.device)
    sigma = kind.sigma(draws)
    x, flow = pack(noised(latents, noise, sigma)), pack(flow_target(latents, noise))
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        wanted = kind.wanted(flux, inputs, x, sigma, flow)
        found = kind.velocity(flux, inputs, seen, x, sigma)
    return F.mse_loss(found.float(), wanted.float())


def compiled(*nets: nn.Module) -> None:
    for net in nets:
        for block in (*getattr(net, "double_blocks", ()), *getattr(net, "single_blocks", ())):
            block.compile(dynamic=False)


def main(words: Sequence[str] | None = None) -> None:
    parser = stage_arguments(__doc__, steps=4000, minutes=5, batch=64, lr=1e-3, data=True)
    parser.add_argument("folder", type=Path, help="the model that ships")
    parser.add_argument("kind", choices=("controlnet", "redux"))
    parser.add_argument("--tower", type=Path, help="folder of what Redux sees by; by default the one that ships")
    parser.add_argument("--scenes", type=int, default=20_000)
    args = parser.parse_args(words)

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    flux = flux_on(args.folder, args.device)
    kind = Seen(flux, args.tower) if args.kind == "redux" else Edges(flux)
    pools = kind.pools(args.scenes, args.root, Encoder(args.folder, args.device))
    trainer = Trainer(kind.net, args.lr, args.steps, args.minutes, warmup=200, decay_from=0.5, rates=kind.rates)
    state = args.work / f"{args.kind}.state.safetensors"
    trainer.resume(state)
    if args.device == "cuda":
        compiled(flux, kind.net)
    losses: list[Tensor] = []
    for step in trainer.loop(args.pause):
        dice = torch.Generator(args.device).manual_seed(step)
        loss = loss_of(kind, flux, pools[step % len(pools)], args.batch, dice, trainer.progress)
        trainer.update(loss)
        losses.append(loss.detach())
        if step % 200 == 0:
            say(f"step {step} loss {torch.stack(losses[-200:]).mean():.4f}")
    trainer.save(state)
    if trainer.progress < 1:
        return
    path = args.work / f"flux-mini-{args.kind}.safetensors"
    write(path, trainer.average())
    say(f"{path}: {path.stat().st_size:,} bytes after {trainer.step} steps")


if __name__ == "__main__":
    main()
