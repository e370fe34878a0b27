"""T5 begins with a sense of order, and its queries learn as slowly as they are small."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "recipe"))

from networks import Networks
from transformers.models.t5.modeling_t5 import T5Attention


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return Networks()


def test_heads_begin_by_looking_back_ahead_around_and_everywhere(nets):
    bias = nets.t5.encoder.block[0].layer[0].SelfAttention.compute_bias(32, 32)[0].detach()  # [head, query, key]
    seen = bias.softmax(-1)
    behind = torch.ones(32, 32).triu(1).bool()
    assert seen[0][behind].max() < 0.01
    assert seen[1][:-1][behind.T[:-1]].max() < 0.01  # nothing stands behind the last
    assert torch.equal(seen[2].argmax(-1), torch.arange(32))
    assert torch.allclose(seen[3], torch.full((32, 32), 1 / 32))


def test_a_word_means_something_else_in_the_other_place(nets):
    ids = torch.zeros(2, 32, dtype=torch.long)
    ids[:, :3] = torch.tensor([[7, 8, 9], [9, 8, 7]])
    one, other = nets.t5(input_ids=ids).last_hidden_state
    assert (one[0] - other[2]).norm() > 0.2 * one[0].norm()


def test_the_queries_of_t5_take_smaller_steps_as_they_hold_the_factor_of_attention(nets):
    queries = [m.q for m in nets.t5.modules() if isinstance(m, T5Attention)]
    named = {name: nets.get_parameter(name) for name in nets.rates()}
    assert {id(q.weight) for q in queries} == {id(p) for p in named.values()}
    for name, rate in nets.rates().items():
        keys = nets.get_parameter(name.replace(".q.", ".k."))
        assert (named[name].std() / keys.std()).item() == pytest.approx(rate, rel=0.05)
