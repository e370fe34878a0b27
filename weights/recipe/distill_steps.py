"""Stage 4: four steps instead of 28, as a LoRA for the model that ships.

    python weights/recipe/distill_steps.py WORK weights/flux-mini

Writes `WORK/fast/pytorch_lora_weights.safetensors`. No picture is needed: the teacher integrates its flow from noise to
a picture, and the student learns to go from any point of a way to its end in one straight step. That is a consistency
model (arXiv 2303.01469, "consistency distillation"), but with ends that are integrated beforehand instead of guessed by
the student's own average, which a small model and a few minutes allow.

Half of the points are the teacher's. The others are where the student itself gets to from the same noise, by Euler in
2, 4 or 8 steps, and the end stays that of the noise: so it learns to mend what its first steps did.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from trainer import Trainer, say, stage_arguments
from transformers import CLIPTextModel, T5EncoderModel

from flux_core.model import Flux
from flux_core.sampling import get_schedule, image_ids
from flux_core.training import PRESETS, Adapter, adapt
from flux_core.variants import VARIANTS

VARIANT = VARIANTS["flux-mini"]
TARGETS = (*PRESETS["blocks"], "norm_out.linear", "proj_out")
RANK = 16
STEPS = (1, 2, 4, 8)
"""numbers of steps that the student is for"""
FINE = 32
"""steps of a trajectory; its points at the schedule of 8 are kept"""


class Texts:
    """Encoded captions of scenes, on the device."""

    def __init__(self, folder: Path, scenes: Path, device: str) -> None:
        t5 = T5EncoderModel.from_pretrained(folder / VARIANT.t5, dtype=torch.bfloat16).to(device)
        clip = CLIPTextModel.from_pretrained(folder / VARIANT.clip, dtype=torch.bfloat16).to(device)
        with safe_open(scenes, "pt", device=device) as file:
            ids = [file.get_tensor(name).flatten(0, 1).long().split(4096) for name in ("t5", "clip")]
        with torch.no_grad():
            self.txt = torch.cat([t5(input_ids=some).last_hidden_state for some in ids[0]])
            self.vec = torch.cat([clip(input_ids=some).pooler_output for some in ids[1]])

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """[n, T, D] and [n, V]"""
        rows = torch.randint(len(self.vec), (n,), device=self.vec.device)
        return self.txt[rows], self.vec[rows]


class Student:
    """The teacher with factors that learn, and the teacher."""

    def __init__(self, flow: Path, size: int, batch: int, device: str) -> None:
        weights = load_file(flow, device=device)
        self.teacher, self.model = (Flux(VARIANT.params).to(device, torch.bfloat16) for _ in range(2))
        for model in (self.teacher, self.model):
            model.load_state_dict(weights)
            if device == "cuda":
                torch._dynamo.config.recompile_limit = 64  # the same code with and without factors and gradients
                for block in (*model.double_blocks, *model.single_blocks):
                    block.compile(dynamic=False)
        self.teacher.requires_grad_(False)
        self.adapter: Adapter = adapt(self.model, TARGETS, RANK, RANK, torch.Generator().manual_seed(1))
        self.batch, self.tokens, self.device = batch, (size // 16) ** 2, device
        self.ids = image_ids(batch, size // 16, size // 16, device)
        self.txt_ids = torch.zeros(batch, VARIANT.max_text, 3, device=device)
        self.schedules = {n: get_schedule(n, self.tokens) for n in (*STEPS, FINE)}

    def noise(self) -> Tensor:
        return torch.randn(self.batch, self.tokens, VARIANT.params.in_channels, device=self.device)

    def velocity(self, model: Flux, x: Tensor, sigma: float, text: tuple[Tensor, Tensor]) -> Tensor:
        """fp32, of latents in fp32 [B, L, C]."""
        t = torch.full((len(x),), sigma, device=x.device)
        txt, vec = text
        with torch.autocast(self.device, torch.bfloat16):
            guidance = torch.full_like(t, VARIANT.guidance)
            return model(x.bfloat16(), self.ids, txt, self.txt_ids, t, vec, guidance).float()

    @torch.no_grad()
    def way(self, model: Flux, x: Tensor, sigmas: list[float], text: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        """Where Euler gets to with each step, at sigmas[1:]."""
        for sigma, after in pairwise(sigmas):
            x = x + (after - sigma) * self.velocity(model, x, sigma, text)
            yield x

    def teach(self, text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's way from noise: its points at the schedule of 8 steps [8, B, L, C] in bf16, and its end."""
        points = [noise := self.noise(), *self.way(self.teacher, noise, self.schedules[FINE], text)]
        return torch.stack([x.bfloat16() for x in points[: -1 : FINE // 8]]), points[-1]

    def point(self, text: tuple[Tensor, Tensor], points: Tensor) -> tuple[Tensor, float]:
        """One of the teacher's points, or of the student's from the same noise, and its sigma."""
        if random.random() < 0.5:
            i = random.randrange(len(points))
            return points[i].float(), self.schedules[8][i]
        steps = random.choice(STEPS[1:])
        sigmas = self.schedules[steps][: random.randrange(1, steps) + 1]
        *_, x = self.way(self.model, points[0].float(), sigmas, text)
        return x, sigmas[-1]


def save(student: Student, stage: Trainer, folder: Path) -> None:
    """Write the average; training goes on with what it had."""
    current = [x.detach().clone() for x in stage.params]
    stage.load_average()
    student.adapter.save(folder, torch.bfloat16)
    with torch.no_grad():
        torch._foreach_copy_(stage.params, current)


@torch.no_grad()
def compare(student: Student, texts: Texts) -> None:
    """Say how far the student's pictures are from the teacher's of the same noise, and the teacher's in few steps."""
    torch.manual_seed(7)
    text, noise = texts.batch(student.batch), student.noise()

    def draw(model: Flux, steps: int) -> Tensor:
        *_, x = student.way(model, noise, student.schedules[steps], text)
        return x

    end = draw(student.teacher, FINE)
    for name, model in (("student", student.model), ("teacher", student.teacher)):
        far = {n: F.mse_loss(draw(model, n), end).sqrt().item() for n in STEPS}
        say(f"{name}, distance from {FINE} steps: " + ", ".join(f"{n} steps {x:.3f}" for n, x in far.items()))


def main() -> None:
    parser = stage_arguments(__doc__, steps=1_000_000, minutes=6, batch=512, lr=1e-3)
    parser.add_argument("folder", type=Path, help="the model that ships")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--ways", type=int, default=40_000, help="of the teacher, from noise to pictures")
    args = parser.parse_args()

    torch.manual_seed(0)
    random.seed(0)
    torch.set_float32_matmul_precision("high")
    texts = Texts(args.folder, args.work / "scenes_256.safetensors", args.device)
    student = Student(args.folder / VARIANT.flow_file, args.size, args.batch, args.device)
    ways = [(text := texts.batch(args.batch), *student.teach(text)) for _ in range(0, args.ways, args.batch)]
    say(f"{len(texts.vec)} captions, {len(ways) * args.batch} ways")

    factors = student.adapter.factors  # numbered, since their names have dots
    module = nn.ModuleList(factors[name] for name in sorted(factors))
    stage = Trainer(module, args.lr, args.steps, args.minutes, warmup=100, decay_from=0.3)
    stage.resume(args.work / "fast.state.safetensors")
    for step in stage.loop(args.pause):
        text, points, end = random.choice(ways)
        x, sigma = student.point(text, points)
        loss = F.mse_loss(student.velocity(student.model, x, sigma, text), (x - end) / sigma)
        stage.update(loss)
        if step % 200 == 0:
            say(f"step {step} sigma {sigma:.2f} loss {loss.item():.4f}")
        if step % 1000 == 999:
            save(student, stage, args.work / "fast")
    stage.save(args.work / "fast.state.safetensors")
    save(student, stage, args.work / "fast")
    stage.load_average()
    compare(student, texts)
    say(f"stopped at step {stage.step}, {stage.progress:.0%} of the stage")


if __name__ == "__main__":
    main()
