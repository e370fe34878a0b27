"""Stage 4: four steps instead of 28, as a LoRA for the model that ships.

    python weights/recipe/distill_steps.py WORK weights/flux-mini

Writes `WORK/fast/pytorch_lora_weights.safetensors`. Two ways after each other, neither of which sees a picture:

*Trajectories.* The teacher integrates its flow from noise to a picture, and the student learns to go from any point of
the way to its end in one straight step (direct consistency, as in arXiv 2303.01469, of a precomputed flow). It answers
with a mean where the end is not decided yet, so few steps are blurred.

*Distribution matching* (DMD2, arXiv 2405.14867, without its discriminator). The student draws as it will be used: Euler
on the schedule of 1, 2, 4 or 8 steps; from a random one of them it answers with a whole picture. That gets noise again,
and two models say where they would go from there: the teacher under guidance, and a *critic*, a copy of the teacher
that follows the student's own pictures by flow matching all the time. Their difference is the direction in which
pictures become more like the teacher's.
"""

import random
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from train_transformer import random_times
from trainer import Trainer, say, stage_arguments
from transformers import CLIPTextModel, T5EncoderModel

from flux_core.model import Flux
from flux_core.sampling import get_schedule, image_ids
from flux_core.training import PRESETS, Adapter, adapt
from flux_core.variants import VARIANTS

VARIANT = VARIANTS["flux-mini"]
TARGETS = (*PRESETS["blocks"], "norm_out.linear", "proj_out")
RANK = 16
STEPS = {1: 0.15, 2: 0.15, 4: 0.5, 8: 0.2}
"""numbers of steps that the student is used with, and how often it is trained for each"""
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
    """The teacher with factors that learn, and what is asked of both and of the critic."""

    def __init__(self, flow: Path, size: int, batch: int, device: str) -> None:
        weights = load_file(flow, device=device)
        self.teacher, self.model, self.critic = (Flux(VARIANT.params).to(device, torch.bfloat16) for _ in range(3))
        for model in (self.teacher, self.model, self.critic):
            model.load_state_dict(weights)
            if device == "cuda":
                torch._dynamo.config.recompile_limit = 64  # the same code with and without factors and gradients
                for block in (*model.double_blocks, *model.single_blocks):
                    block.compile(dynamic=False)
        self.teacher.requires_grad_(False)
        self.critic.float()
        self.adapter: Adapter = adapt(self.model, TARGETS, RANK, RANK, torch.Generator().manual_seed(1))
        self.batch, self.tokens, self.device = batch, (size // 16) ** 2, device
        self.ids = image_ids(batch, size // 16, size // 16, device)
        self.txt_ids = torch.zeros(batch, VARIANT.max_text, 3, device=device)
        self.schedules = {n: get_schedule(n, self.tokens) for n in (*STEPS, FINE)}

    def noise(self) -> Tensor:
        return torch.randn(self.batch, self.tokens, VARIANT.params.in_channels, device=self.device)

    def velocity(self, model: Flux, x: Tensor, t: Tensor | float, text: tuple[Tensor, Tensor], g: float) -> Tensor:
        """fp32, of latents in fp32 [B, L, C] at the times t [B], or at one time."""
        t = t if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
        txt, vec = text
        with torch.autocast(self.device, torch.bfloat16):
            given = x.bfloat16(), self.ids, txt, self.txt_ids, t, vec, torch.full_like(t, g)
            return model(*given).float()

    @torch.no_grad()
    def trajectory(self, text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's way from noise: its points at the schedule of 8 steps [8, B, L, C], and its end [B, L, C]."""
        x, points, sigmas = self.noise(), [], self.schedules[FINE]
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            if i % (FINE // 8) == 0:
                points.append(x.bfloat16())
            x = x + (after - sigma) * self.velocity(self.teacher, x, sigma, text, VARIANT.guidance)
        return torch.stack(points), x

    def picture(self, text: tuple[Tensor, Tensor]) -> Tensor:
        """What the student takes for the picture at a random step of its own way, with a gradient. [B, L, C]"""
        steps = random.choices(list(STEPS), list(STEPS.values()))[0]
        sigmas, x = self.schedules[steps], self.noise()
        last = random.randrange(steps)
        with torch.no_grad():
            for sigma, after in pairwise(sigmas[: last + 1]):
                x = x + (after - sigma) * self.velocity(self.model, x, sigma, text, VARIANT.guidance)
        return x - sigmas[last] * self.velocity(self.model, x, sigmas[last], text, VARIANT.guidance)

    def matching_loss(self, picture: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """A loss whose gradient is where the critic and the teacher disagree (DMD, equations 7 and 8)."""
        with torch.no_grad():
            t = random_times(len(picture), picture.device).clamp(0.02, 0.98)
            x = torch.lerp(picture, torch.randn_like(picture), t[:, None, None])
            teacher, critic = (
                x - t[:, None, None] * self.velocity(model, x, t, text, g)
                for model, g in ((self.teacher, VARIANT.guidance), (self.critic, 1.0))
            )
            pull = (critic - teacher) / (picture - teacher).abs().mean((1, 2), keepdim=True)
        return 0.5 * F.mse_loss(picture, (picture - pull).detach())

    def critic_loss(self, picture: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Flow matching on the student's pictures."""
        t, noise = random_times(len(picture), picture.device), torch.randn_like(picture)
        x = torch.lerp(picture, noise, t[:, None, None])
        return F.mse_loss(self.velocity(self.critic, x, t, text, 1.0), noise - picture)


def stage_of(student: Student, lr: float, minutes: float, steps: int) -> Trainer:
    """Training of the factors. Modules are numbered, since their names have dots."""
    factors = student.adapter.factors
    module = nn.ModuleList(factors[name] for name in sorted(factors))
    return Trainer(module, lr, steps, minutes, warmup=100, decay_from=0.3)


def follow_trajectories(student: Student, texts: Texts, count: int, stage: Trainer, pause: float) -> None:
    ways = []
    while len(ways) * student.batch < count:
        text = texts.batch(student.batch)
        ways.append((text, *student.trajectory(text)))
    say(f"{len(ways) * student.batch} trajectories")
    for step in stage.loop(pause):
        text, points, end = random.choice(ways)
        i = random.randrange(len(points))
        x, sigma = points[i].float(), student.schedules[8][i]
        answer = student.velocity(student.model, x, sigma, text, VARIANT.guidance)
        loss = F.mse_loss(answer, (x - end) / sigma)
        stage.update(loss)
        if step % 200 == 0:
            say(f"trajectories: step {step} loss {loss.item():.4f}")


def match_distribution(
    student: Student, texts: Texts, stage: Trainer, critic: Trainer, ratio: int, pause: float, folder: Path
) -> None:
    for step in stage.loop(pause):
        text = texts.batch(student.batch)
        picture = student.picture(text)
        loss = student.matching_loss(picture, text)
        stage.update(loss)
        for _ in range(ratio):
            error = student.critic_loss(picture.detach(), text)
            critic.update(error)
        if step % 100 == 0:
            say(f"matching: step {step} loss {loss.item():.4f} critic {error.item():.4f}")
        if step % 500 == 499:
            save(student, stage, folder)


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
        x, sigmas = noise, student.schedules[steps]
        for sigma, after in pairwise(sigmas):
            x = x + (after - sigma) * student.velocity(model, x, sigma, text, VARIANT.guidance)
        return x

    end = draw(student.teacher, FINE)
    for name, model in (("student", student.model), ("teacher", student.teacher)):
        far = {n: F.mse_loss(draw(model, n), end).sqrt().item() for n in STEPS}
        say(f"{name}, distance from {FINE} steps: " + ", ".join(f"{n} steps {x:.3f}" for n, x in far.items()))


def main() -> None:
    parser = stage_arguments(__doc__, steps=1_000_000, minutes=8, batch=256, lr=3e-4)
    parser.add_argument("folder", type=Path, help="the model that ships")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--trajectories", type=int, default=20_000)
    parser.add_argument("--first", type=float, default=2, help="minutes of following trajectories, before the others")
    parser.add_argument("--first-lr", type=float, default=1e-3)
    parser.add_argument("--ratio", type=int, default=3, help="steps of the critic for one of the student")
    parser.add_argument("--critic-lr", type=float, default=1e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    random.seed(0)
    torch.set_float32_matmul_precision("high")
    texts = Texts(args.folder, args.work / "scenes_256.safetensors", args.device)
    student = Student(args.folder / VARIANT.flow_file, args.size, args.batch, args.device)
    say(f"{len(texts.vec)} captions")
    first = stage_of(student, args.first_lr, args.first, args.steps)
    first.resume(args.work / "fast_first.state.safetensors")
    if first.progress < 1:
        follow_trajectories(student, texts, args.trajectories, first, args.pause)
        first.save(args.work / "fast_first.state.safetensors")
    first.load_average()
    compare(student, texts)
    student.adapter.save(args.work / "fast_first", torch.bfloat16)

    stage = stage_of(student, args.lr, args.minutes, args.steps)
    critic = Trainer(student.critic, args.critic_lr, args.steps, args.minutes, warmup=100)
    for trainer, name in ((stage, "fast"), (critic, "fast_critic")):
        trainer.resume(args.work / f"{name}.state.safetensors")
    match_distribution(student, texts, stage, critic, args.ratio, args.pause, args.work / "fast")
    for trainer, name in ((stage, "fast"), (critic, "fast_critic")):
        trainer.save(args.work / f"{name}.state.safetensors")
    stage.load_average()
    compare(student, texts)
    path = student.adapter.save(args.work / "fast", torch.bfloat16)
    say(f"{path}: step {stage.step}, {stage.progress:.0%} of the stage")


if __name__ == "__main__":
    main()
