"""Stage 3: classifier-free guidance, distilled into the guidance embedding.

    python weights/recipe/distill.py WORK

Classifier-free guidance (arXiv 2207.12598) asks the model twice, with the text and without, and goes further along the
difference. FLUX.1-dev answers at once for any strength, since its strength is an input. As in "On Distillation of
Guided Diffusion Models" (arXiv 2210.03142), the student starts as a copy of the teacher and learns, for random
strengths w, to answer `uncond + w * (cond - uncond)` in one forward. w = 1 is the teacher itself, so two-pass guidance
goes on working there. The text encoders stay as they are.
"""

import time

import torch
import torch.nn.functional as F
from networks import VARIANT, Networks
from torch import Tensor
from train_transformer import Scenes, empty_text, random_times
from trainer import Trainer, read_shards, restore, say, stage_arguments, write_shards

STRENGTHS = (1.0, 8.0)


@torch.no_grad()
def teach(
    teacher: Networks, data: Tensor, ids: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """A noisy latent with its time and text, a guidance strength, and the velocity under that guidance."""
    n = len(data)
    t = random_times(n, data.device)
    x = torch.lerp(data, torch.randn_like(data), t[:, None, None])
    one = torch.ones_like(t)
    txt, vec = teacher.encode_text(*ids)
    no_txt, no_vec = teacher.encode_text(*empty)
    cond = teacher.velocity(x, t, txt, vec, one)
    uncond = teacher.velocity(x, t, no_txt.expand(n, -1, -1), no_vec.expand(n, -1), one)
    low, high = STRENGTHS
    w = low + (high - low) * torch.rand_like(t)
    w = torch.where(torch.rand_like(t) < 0.1, one, w)
    return x, t, txt, vec, w, (uncond + w[:, None, None] * (cond - uncond)).float()


def student_loss(student: Networks, x, t, txt, vec, w, target) -> Tensor:
    return F.mse_loss(student.velocity(x, t, txt, vec, w).float(), target)


def main() -> None:
    parser = stage_arguments(__doc__, steps=2500, minutes=5, batch=256, lr=5e-4)
    parser.add_argument("--size", type=int, nargs="+", default=[256, 128], help="one in four steps goes to the last")
    args = parser.parse_args()

    torch.manual_seed(time.time_ns() % 2**32)
    torch.set_float32_matmul_precision("high")
    weights = read_shards(args.work, "networks")
    teacher, student = Networks().to(args.device).eval(), Networks().to(args.device)
    for nets in (teacher, student):
        restore(nets, weights)
    student.t5.requires_grad_(False)
    student.clip.requires_grad_(False)
    trainer = Trainer(student.flux, args.lr, args.steps, args.minutes, warmup=100, decay_from=0.3)
    state = args.work / "distilled.state.safetensors"
    trainer.resume(state)
    scenes = [Scenes(args.work / f"scenes_{size}.safetensors", args.device) for size in args.size]
    empty = empty_text(args.work, VARIANT.max_text, args.device)
    cuda = args.device == "cuda"
    step_teach = torch.compile(teach, dynamic=False) if cuda else teach
    step_loss = torch.compile(student_loss, dynamic=False) if cuda else student_loss

    for step in trainer.loop(args.pause):
        data, *ids = scenes[0 if step % 4 else -1].batch(args.batch, empty)
        with torch.autocast(args.device, torch.bfloat16):
            loss = step_loss(student, *step_teach(teacher, data, tuple(ids), empty))
        trainer.update(loss)
        if step % 200 == 0:
            say(f"step {step} loss {loss.item():.5f}")
    trainer.save(state)
    write_shards(args.work, "distilled", trainer.average())
    say(f"stopped at step {trainer.step}, {trainer.progress:.0%} of the stage")


if __name__ == "__main__":
    main()
