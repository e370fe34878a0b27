"""A random LoRA on the model that ships."""

import pytest
import torch
from golden_files import distance
from random_lora import factors, write

from flux_core.checkpoint import load_flux
from flux_core.lora import attach
from flux_core.sampling import image_ids
from flux_core.variants import VARIANTS

MINI = VARIANTS["flux-mini"]


def model(fp8=False):
    return load_flux(MINI, "cpu", torch.bfloat16 if fp8 else torch.float32, format="fp8" if fp8 else None)


@pytest.fixture(scope="module")
def mini():
    return model()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [
        write(folder / f"{i}.safetensors", factors(MINI.params, rank, seed=i, strength=0.1))
        for i, rank in enumerate((4, 6))
    ]


@torch.no_grad()
def velocity(flux, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = {"img": (1, 64, 64), "txt": (1, 8, MINI.params.context_in_dim), "y": (1, MINI.params.vec_in_dim)}
    inputs = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    inputs |= {"img_ids": image_ids(1, 8, 8), "txt_ids": torch.zeros(1, 8, 3)}
    inputs |= {name: torch.tensor([x]).to(dtype) for name, x in (("timesteps", 0.7), ("guidance", 3.5))}
    return flux(**inputs).float()


def test_scale_0_is_the_base_to_the_bit(mini, files):
    base = velocity(mini)
    with attach(mini, files[0], 0.0) as handle:
        assert torch.equal(velocity(mini), base)
        handle.scale = 1.0
        assert distance(velocity(mini), base) > 0.01
    assert torch.equal(velocity(mini), base)


def test_two_are_the_sum_of_both_in_any_order(mini, files, tmp_path):
    """As one file whose factors are those of both, side by side."""
    both, parts = {}, [factors(MINI.params, rank, seed=i, strength=0.1) for i, rank in enumerate((4, 6))]
    for name, x in parts[0].items():
        both[name] = torch.cat((x, parts[1][name]), dim=1 if "lora_up" in name else 0)
    with attach(mini, write(tmp_path / "both.safetensors", both)):
        expected = velocity(mini)
    for order in (files, files[::-1]):
        handles = [attach(mini, file) for file in order]
        assert distance(velocity(mini), expected) < 1e-6
        for handle in handles:
            handle.remove()


def test_merged_and_beside_agree_to_rounding(mini, files):
    with attach(mini, files[0], 0.7):
        beside = velocity(mini)
    before = {name: x.clone() for name, x in mini.state_dict().items()}
    with attach(mini, files[0], 0.7, merge=True):
        assert distance(velocity(mini), beside) < 1e-5
    assert all(torch.equal(x, before[name]) for name, x in mini.state_dict().items())


def test_fp8_with_a_branch_is_as_near_to_the_truth_as_fp8_alone(mini, files):
    fp8, base = model(fp8=True), velocity(mini)
    alone = distance(velocity(fp8, torch.bfloat16), base)
    with attach(mini, files[0]), attach(fp8, files[0]):
        assert distance(velocity(fp8, torch.bfloat16), velocity(mini)) < 1.2 * alone
