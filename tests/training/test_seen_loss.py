"""What a model sees while it learns is what it sees when it draws."""

from dataclasses import replace

import pytest
import torch
from small import PARAMS, RECIPE, examples, small_adapter

from flux_core.errors import UsageError
from flux_core.sampling import flow_velocity, image_ids, pack
from flux_core.sampling.family import reference_tokens
from flux_core.training.loop import each_loss
from flux_core.training.seen import widen


def seen_examples(count):
    draw = torch.Generator().manual_seed(3)
    return [one._replace(seen=torch.randn(count, 16, 4, 6, generator=draw)) for one in examples(2)]


@pytest.mark.parametrize(("takes", "count"), [("canny", 1), ("fill", 5), ("reference", 1), ("reference", 2)])
def test_the_loss_is_that_of_the_velocity_that_draws(takes, count):
    adapter, batch = small_adapter(), seen_examples(count)
    widen(adapter.model, takes)
    with torch.no_grad():
        adapter.model.img_in.weight.normal_(generator=torch.Generator().manual_seed(4))
    noise, sigma = torch.randn(2, 16, 4, 6), torch.tensor([0.5, 0.5])
    recipe = replace(RECIPE, takes=takes)
    found = each_loss(adapter, batch, recipe, noise, sigma)
    seen = torch.stack([one.seen for one in batch]).bfloat16()
    if takes != "reference":
        given = {"img_cond": torch.cat([pack(one) for one in seen.unbind(1)], dim=-1).float()}
    else:
        parts = [reference_tokens(seen[:, i], "cpu") for i in range(count)]
        for i, part in enumerate(parts):
            part["img_cond_seq_ids"][..., 0] = 1 + i
        given = {name: torch.cat([part[name].float() for part in parts], dim=1) for name in parts[0]}
    latents = torch.stack([one.latents for one in batch])
    txt, vec = torch.stack([one.txt for one in batch]), torch.stack([one.vec for one in batch])
    ids, txt_ids = image_ids(2, 2, 3, "cpu"), torch.zeros(2, txt.shape[1], 3)
    velocity = flow_velocity(adapter.model, ids, txt, txt_ids, vec, recipe.guidance, **given)
    wanted = velocity(pack(0.5 * latents + 0.5 * noise), 0.5) - pack(noise - latents)
    torch.testing.assert_close(found, wanted.square().mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_only_known_things_are_seen():
    with pytest.raises(UsageError, match="takes must be one of"):
        replace(RECIPE, takes="smells")
    assert PARAMS.in_channels == 64
