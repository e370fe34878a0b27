"""Steps of diffusers' recipe on a tiny model: loss, gradients and what the optimizer makes of them.

`tests/golden/train/` was made by diffusers and peft, not by our code; tolerances are those of its README.
"""

import json
import math

import pytest
import torch
from golden_files import FOLDER, distance
from safetensors.torch import load_file, safe_open

from flux_core.model import Flux, FluxParams
from flux_core.sampling import FlowInputs, image_ids, pack
from flux_core.training import MAPS, WEIGHTINGS, adapt, flow_loss, flow_target, noised, on_table

CASES = ["dev", "dev_accum2", "dev_outer", "dev_wide", "schnell_tall"]
TABLES = json.loads((FOLDER / "train" / "timesteps.json").read_text())


class Case:
    def __init__(self, name):
        path = FOLDER / "train" / f"train_step_{name}.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.facts = json.loads(file.metadata()["case"])
        with safe_open(FOLDER / "train" / "train_base.safetensors", "pt") as file:
            params = file.metadata()
            weights = {k.removeprefix("weights."): file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        given = json.loads(params["params"])
        given["guidance_embed"] = "schnell" not in name
        if not given["guidance_embed"]:
            weights = {k: x for k, x in weights.items() if not k.startswith("guidance_in.")}
        self.model = Flux(FluxParams(**given)).float()
        self.model.load_state_dict(weights)
        self.adapter = adapt(self.model, self.facts["target_modules"], self.facts["r"], self.facts["lora_alpha"])
        self.adapter.load(self.group("init"))
        self.weighting = WEIGHTINGS[self.facts["weighting_scheme"]]

    def group(self, prefix):
        return {k.removeprefix(f"{prefix}."): x for k, x in self.tensors.items() if k.startswith(f"{prefix}.")}

    def inputs(self, number):
        """Latents, noise, sigma and what the velocity is conditioned on, of a micro-batch."""
        given = self.group(f"in.{number}")
        batch, _, h, w = given["latents"].shape
        inputs = FlowInputs(
            img_ids=image_ids(batch, h // 2, w // 2),
            txt=given["prompt_embeds"],
            txt_ids=torch.zeros(batch, given["prompt_embeds"].shape[1], 3),
            vec=given["pooled"],
            guidance=torch.full((batch,), float(self.facts["guidance"] or 0)),
        )
        return inputs, given["latents"], given["noise"], on_table(given["u"])

    def losses(self, number):
        inputs, *rest = self.inputs(number)
        return flow_loss(self.model, inputs, *rest, weighting=self.weighting)

    def train(self, batches):
        """Losses and gradient norms of the case's steps on these micro-batches in turn."""
        facts, parameters = self.facts, self.adapter.parameters()
        how = facts["optimizer"]
        optimizer = torch.optim.AdamW(
            parameters, how["lr"], tuple(how["betas"]), eps=how["eps"], weight_decay=how["weight_decay"]
        )
        losses, norms, first = [], [], None
        for _ in range(facts["optimizer_steps"]):
            for _ in range(facts["gradient_accumulation_steps"]):
                loss = self.losses(next(batches)).mean()
                (loss / facts["gradient_accumulation_steps"]).backward()
                losses.append(loss.item())
            first = first or {name: x.clone() for name, x in self.adapter.grads().items()}
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, facts["max_grad_norm"] or math.inf).item())
            optimizer.step()
            optimizer.zero_grad()
        return losses, norms, first


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def test_the_modules_are_those_that_peft_matches(case):
    assert sorted(case.adapter.factors) == sorted(case.facts["matched"])


def test_a_step_sees_what_diffusers_saw(case):
    inputs, latents, noise, sigma = case.inputs(0)
    assert torch.equal(1000 * sigma, case.tensors["out.timesteps"].float())
    x = pack(noised(latents, noise, sigma))
    assert distance(x, case.tensors["out.noisy_packed"]) < 1e-6
    assert torch.allclose(flow_target(latents, noise), case.tensors["out.target"])
    guidance = inputs.guidance if case.model.params.guidance_embed else None
    with torch.no_grad():
        found = case.model(x, inputs.img_ids, inputs.txt, inputs.txt_ids, sigma, inputs.vec, guidance)
    assert distance(found, case.tensors["out.pred_packed"]) < 5e-5


@pytest.mark.parametrize("kind", ["same", "diff"])
def test_training_is_diffusers_training(case, kind):
    accumulation, steps = case.facts["gradient_accumulation_steps"], case.facts["optimizer_steps"]
    order = range(accumulation * steps) if kind == "diff" else list(range(accumulation)) * steps
    losses, norms, grads = case.train(iter(order))
    assert losses == pytest.approx(case.tensors[f"out.losses_{kind}"].tolist(), rel=1e-5)
    assert norms == pytest.approx(case.tensors[f"out.grad_norms_{kind}"].tolist(), rel=5e-5)
    theirs = case.group("grad")
    assert grads.keys() == theirs.keys()
    assert distance(*(torch.cat([one[k].flatten() for k in theirs]) for one in (grads, theirs))) < 1e-4
    rms = torch.cat([x.flatten() for x in theirs.values()]).square().mean().sqrt()
    init, after, found = case.group("init"), case.group(f"after_{kind}"), case.adapter.state()
    seen = {k: x.abs() > 0.01 * rms for k, x in theirs.items()}
    ours, expected = (torch.cat([(one[k] - init[k])[seen[k]] for k in theirs]) for one in (found, after))
    assert distance(ours, expected) < 2e-4 and (ours - expected).abs().max() < 1e-4


def test_the_model_is_its_own_again(case):
    names = {name for name, _ in case.model.named_modules()}
    with torch.no_grad():
        adapted = case.losses(0)
        case.adapter.remove()
        plain = case.losses(0)
    assert not torch.equal(adapted, plain)
    assert {name for name, _ in case.model.named_modules()} < names


def rows(tool, *names):
    return [row for row in TABLES["maps"] if row["tool"] == tool and row["name"] in names]


def test_levels_are_drawn_as_the_known_trainers_draw_them():
    for row in rows("diffusers", "logit_normal", "none"):
        draws = torch.tensor(row["draw"]["values"])
        how = {"mean": "logit_mean", "std": "logit_std"} if row["name"] == "logit_normal" else {}
        u = MAPS["logit_normal" if how else "uniform"].sigma(draws, **{k: row["params"][v] for k, v in how.items()})
        assert (1000 * on_table(u)).tolist() == pytest.approx(row["timesteps"], abs=1e-3)
    for row in rows("kohya", "uniform", "sigmoid", "shift", "flux_shift"):
        draws, given = torch.tensor(row["draw"]["values"]), row["params"]
        named = {"sigmoid_scale": "scale", "discrete_flow_shift": "shift", "packed_tokens": "tokens"}
        options = {named[key]: value for key, value in given.items() if key in named}
        found = MAPS[row["name"]].sigma(draws, **options)
        assert found.tolist() == pytest.approx(row["sigmas"], rel=1e-5, abs=1e-6)


def test_weightings_are_the_known_ones():
    sigmas = torch.tensor(TABLES["loss_weightings"]["sigmas"])
    named = {row["name"]: row["weights"] for row in TABLES["loss_weightings"]["rows"]}
    for name, weigh in WEIGHTINGS.items():
        assert weigh(sigmas).tolist() == pytest.approx([float(x) for x in named[name]], rel=1e-5)
